"""Normalization of flattened parameters, whose scales differ by orders of magnitude from tensor to tensor."""

from __future__ import annotations

from torch import Tensor, nn

from pdiff_ray.networks.subset import Subset

MIN_RELATIVE_STD = 1e-6  # of the mean over all values


class Normalizer(nn.Module):
    """Shifts and scales vectors (n, D).

    Args:
        mean: (D,).
        std: (D,), above zero.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    @staticmethod
    def fit(vectors: Tensor, mode: str, subset: Subset) -> Normalizer:
        """Takes the statistics of vectors (K, D).

        Args:
            mode: "dimension": mean and standard deviation of each value over the zoo; "tensor": of each tensor, over
                its values and averaged over the zoo; "centered_tensor": mean of each value, and one scale per tensor,
                the root mean square of the centred values.
        """
        # From the first member on: the rounding errors of large values would pass for a spread.
        moved = vectors - vectors[0]
        mean, std = vectors[0] + moved.mean(0), moved.std(0, correction=0)
        if len(vectors) == 1:  # one member has no spread over the zoo; its tensors' own is the only scale there is
            mode = "tensor"
        if mode != "dimension":
            for entry in subset.entries:
                piece = slice(entry.offset, entry.offset + entry.size)
                if mode == "tensor":
                    mean[piece] = vectors[:, piece].mean()
                    within = vectors[:, piece].std(1, correction=0).mean()
                    # One value, or several that are equal, have a spread over the zoo alone.
                    std[piece] = within if within > 0 else (vectors[:, piece] - mean[piece]).square().mean().sqrt()
                else:
                    std[piece] = (vectors[:, piece] - mean[piece]).square().mean().sqrt()
        # What does not move in the zoo is decoded with an error; a small scale keeps it where it was.
        return Normalizer(mean, std.clamp(min=max(MIN_RELATIVE_STD * float(std.mean()), 1e-12)))

    def normalize(self, vectors: Tensor) -> Tensor:
        return (vectors - self.mean) / self.std

    def unnormalize(self, vectors: Tensor) -> Tensor:
        return vectors * self.std + self.mean
