"""The samples that models are scored on, with what answers to them are compared with."""

import hashlib
from dataclasses import dataclass
from functools import cached_property

from pocl.data.batches import EncodedSample


@dataclass(frozen=True)
class EncodedDataset:
    """Samples encoded once, in the order of their file, and the references of each."""

    samples: tuple[EncodedSample, ...]
    references: tuple[tuple[str, ...], ...]
    prompts: tuple[str, ...] = ()
    """What the first samples ask, for people to read; where it is not known their tokens are shown as text."""

    @cached_property
    def scored_rows(self) -> tuple[int, ...]:
        """The places of the samples that have a reference to compare with. What waits for an answer has none, and one
        that says nothing, but calls a tool or only thinks, is none.
        """
        return tuple(
            row for row, references in enumerate(self.references) if any(reference.strip() for reference in references)
        )

    @cached_property
    def scored(self) -> "EncodedDataset":
        """The samples at :attr:`scored_rows`."""
        if len(self.scored_rows) == len(self.samples):
            return self
        return EncodedDataset(
            tuple(self.samples[row] for row in self.scored_rows),
            tuple(self.references[row] for row in self.scored_rows),
        )

    @property
    def digest(self) -> str:
        """SHA-256 over the samples as tokens and what of them is a prompt, in their order."""
        digest = hashlib.sha256()
        for sample in self.samples:
            digest.update(f"{sample.digest} {sample.content_digest}\n".encode())
        return digest.hexdigest()

    @property
    def sample_digests(self) -> tuple[str, ...]:
        """SHA-256 over each sample as tokens with its references, in their order."""
        return tuple(
            hashlib.sha256(f"{sample.digest} {sample.content_digest} {references!r}".encode()).hexdigest()
            for sample, references in zip(self.samples, self.references, strict=True)
        )

    @property
    def references_digest(self) -> str:
        """SHA-256 over the references, in the order of the samples."""
        return hashlib.sha256(repr(self.references).encode()).hexdigest()
