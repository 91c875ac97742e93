"""The samples that models are scored on, with what answers to them are compared with."""

import hashlib
from dataclasses import dataclass

from pocl.data.batches import EncodedSample


@dataclass(frozen=True)
class EncodedDataset:
    """Samples encoded once, in the order of their file, and the references of each."""

    samples: tuple[EncodedSample, ...]
    references: tuple[tuple[str, ...], ...]

    @property
    def digest(self) -> str:
        """SHA-256 over the samples as tokens, in their order."""
        digest = hashlib.sha256()
        for sample in self.samples:
            digest.update(f"{sample.digest} {list(sample.input_ids)}\n".encode())
        return digest.hexdigest()

    @property
    def references_digest(self) -> str:
        """SHA-256 over the references, in the order of the samples."""
        return hashlib.sha256(repr(self.references).encode()).hexdigest()
