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

    @cached_property
    def scored(self) -> "EncodedDataset":
        """The samples that have a reference; what waits for an answer cannot be scored."""
        kept = [index for index, references in enumerate(self.references) if references]
        if len(kept) == len(self.samples):
            return self
        return EncodedDataset(
            tuple(self.samples[index] for index in kept), tuple(self.references[index] for index in kept)
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
