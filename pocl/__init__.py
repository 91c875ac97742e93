"""The POCL engine: distil a language model in stages, from easy samples to hard ones.

Usable without any service. Four names are its public surface: :func:`pocl.run.run`,
:func:`pocl.losses.divergence`, :class:`pocl.spec.DistillationSpec` and the events in
:mod:`pocl.events`. This package itself imports nothing, so that the API may read the
specification and the plan on a machine without torch.
"""
