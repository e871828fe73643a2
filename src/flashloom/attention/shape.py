"""What an attention layer looks like: head counts, and widths of keys and values."""

from __future__ import annotations

from flashloom.dataclass import dataclass
from flashloom.kv_cache.integers import integer


@dataclass(frozen=True)
class HeadShape:
    """Head counts and widths of one attention layer.

    `q_heads` query heads share `kv_heads` key/value heads, `group` to each; keys and queries are `dim` wide, values
    and outputs `value_dim` (as wide as the keys unless given). With `latent_value` the cache holds keys alone and a
    value is the first `value_dim` elements of its key. Raises TypeError for what is not an int and ValueError for
    sizes below 1 or head counts that do not divide."""

    q_heads: int
    kv_heads: int
    dim: int
    value_dim: int = None  # type: ignore[assignment]  # an int after construction
    latent_value: bool = False

    def __post_init__(self) -> None:
        if self.value_dim is None:
            object.__setattr__(self, "value_dim", self.dim)
        for name in ("q_heads", "kv_heads", "dim", "value_dim"):
            value = getattr(self, name)
            object.__setattr__(self, name, integer(f"HeadShape {name}", value, 1))
        if self.q_heads % self.kv_heads:
            raise ValueError(
                f"HeadShape q_heads={self.q_heads}, kv_heads={self.kv_heads}: every kv head serves the same number of "
                "query heads, so q_heads "
                "must be a multiple of kv_heads"
            )
        if self.latent_value and self.value_dim > self.dim:
            raise ValueError(
                f"HeadShape value_dim={self.value_dim}, dim={self.dim}: a value that is part of its key cannot be "
                "wider than it"
            )

    @classmethod
    def mla(cls, q_heads: int, latent: int, rope: int) -> HeadShape:
        """Multi-head latent attention after weight absorption (DeepSeek-V2, 2024): one kv head whose key is `latent +
        rope` wide and whose value is the first `latent` elements of the key. The model's `sm_scale` comes from its
        unabsorbed head width: pass it to Attention."""
        for name, value in (("latent", latent), ("rope", rope)):
            integer(f"HeadShape.mla {name}", value, int(name == "latent"))
        return cls(q_heads, 1, latent + rope, latent, latent_value=True)

    @property
    def group(self) -> int:
        """Query heads per kv head."""
        return self.q_heads // self.kv_heads
