"""The paged cache: storage for every layer, seen as [pages, page_size, kv_heads, dim] whatever the memory order."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NoReturn

import torch

from flashloom.kv_cache.integers import on_host, positive

if TYPE_CHECKING:
    from flashloom.attention.shape import HeadShape

KV_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
LAYOUTS = ("NHD", "HND")
#: Largest finite value of the dtypes that quantised caches store.
LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0, torch.int8: 127.0}
Scale = float | torch.Tensor | None


class KV:
    """One layer's keys and values as the kernels take them: k [pages, page_size, kv_heads, dim], v the same with
    value_dim, inner stride 1, other strides free and independent; k_scale, v_scale float32 [1], [kv_heads], [pages,
    kv_heads] or None (1)."""

    __slots__ = ("__weakref__", "k", "k_scale", "layout", "signature", "v", "v_scale")
    if TYPE_CHECKING:
        k: torch.Tensor
        v: torch.Tensor
        k_scale: torch.Tensor | None
        v_scale: torch.Tensor | None
        layout: str
        signature: tuple

    def __init__(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        k_scale: torch.Tensor | None = None,
        v_scale: torch.Tensor | None = None,
        layout: str = "NHD",
    ):
        _set_k(self, k)
        _set_v(self, v)
        _set_k_scale(self, k_scale)
        _set_v_scale(self, v_scale)
        _set_layout(self, layout)  # the memory order, for information: the views already have the logical one
        _set_signature(self, signature(k, v, k_scale, v_scale))

    def __setattr__(self, name: str, value: object) -> NoReturn:
        # a plan that has accepted it would go on with what it was
        raise AttributeError(
            f"a layer of a cache does not change: write into .k and .v, or pass run() a tuple (k, v, k_scale, v_scale) "
            f"for another {name}"
        )

    def __repr__(self) -> str:
        k, v = self.k, self.v
        scales = "" if self.k_scale is None and self.v_scale is None else ", scaled"
        dtype = str(k.dtype).removeprefix("torch.")
        return f"KV(k {list(k.shape)}, v {list(v.shape)}, {dtype}, {self.layout}, {k.device}{scales})"

    def __getitem__(self, index: object) -> NoReturn:
        raise TypeError("a layer of a cache is not indexed: its keys and values are .k and .v [pages, page_size, ...]")

    __iter__ = __len__ = None  # it is no pair of keys and values either


# past __setattr__, as plain assignments would
_set_k, _set_v, _set_k_scale, _set_v_scale, _set_layout, _set_signature = (
    KV.__dict__[name].__set__ for name in ("k", "v", "k_scale", "v_scale", "layout", "signature")
)


def signature(k: torch.Tensor, v: torch.Tensor, k_scale: torch.Tensor | None, v_scale: torch.Tensor | None) -> tuple:
    """Everything about KV tensors that decides whether a plan accepts them; equal signatures are accepted alike."""
    odd = k.requires_grad or v.requires_grad or k.is_neg() or v.is_neg()
    kinds = type(k), type(v)
    form = (k.shape, v.shape, k.dtype, v.dtype, k.device, v.device, k.stride(-1), v.stride(-1), odd, kinds)
    if k_scale is None and v_scale is None:
        return form
    return (*form, *(None if s is None else (s.shape, s.dtype, s.device, s.data_ptr()) for s in (k_scale, v_scale)))


def place(device: torch.device | str) -> torch.device:
    """A device with its index, so that comparisons are exact. Raises ValueError for one that torch cannot reach."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        have = "cpu and cuda" if torch.cuda.is_available() else "the cpu alone"
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise ValueError(f"device={str(device)!r} is not to be had here, torch reaches {have} ({reason})") from None


def check_layout(layout: object) -> str:
    if layout not in LAYOUTS:
        raise ValueError(
            f'layout={layout!r}: must be "NHD" ([pages, page_size, kv_heads, dim]) or '
            '"HND" ([pages, kv_heads, page_size, dim])'
        )
    return str(layout)


def make_scale(name: str, value: object, pages: int, kv_heads: int, device: torch.device) -> torch.Tensor | None:
    """A scale as float32 [1], [kv_heads] or [pages, kv_heads] on `device`; host values must be positive and finite."""
    if value is None:
        return None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}={value}: a scale must be positive and finite")
        return torch.full((1,), float(value), dtype=torch.float32, device=device)
    check_scale(name, value, pages, kv_heads)
    assert isinstance(value, torch.Tensor)
    if on_host(value):
        check_scale_values(name, value)
    return value.to(device).contiguous()


def check_scale(name: str, value: object, pages: int, kv_heads: int) -> None:
    """Raise unless `value` is a float32 tensor of one of the three shapes; its contents are not looked at."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(
            f"{name} is {type(value).__name__}: give a float or a float32 tensor [1], [kv_heads] or [pages, kv_heads]"
        )
    if value.dtype != torch.float32:
        raise TypeError(f"{name} has dtype {value.dtype}: must be float32; convert it with .float()")
    if tuple(value.shape) not in ((1,), (kv_heads,), (pages, kv_heads)):
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}: must be [1], [kv_heads] = [{kv_heads}] or [pages, kv_heads] = "
            f"[{pages}, {kv_heads}]"
        )


def check_scale_values(name: str, value: torch.Tensor) -> None:
    wrong = ~(torch.isfinite(value) & (value > 0))
    if wrong.any():
        at = tuple(int(i) for i in wrong.nonzero()[0])
        raise ValueError(f"{name}{list(at)} = {float(value[at])}: a scale must be positive and finite")


class PagedKVCache:
    """Keys and values of `layers` layers in `pages` pages of `page_size` tokens, zeroed.

    `cache[i].k` is [pages, page_size, kv_heads, dim] and `cache[i].v` the same with value_dim; `layout` is the order
    in memory, "NHD" or "HND" (a head's tokens of a page together). dtype: float32, float16, bfloat16, or
    float8_e4m3fn, float8_e5m2, int8 with `k_scale`, `v_scale` (stored value = value / scale): a float, or float32 [1],
    [kv_heads] or [pages, kv_heads], the same for all layers. With `HeadShape.mla` only keys are stored and `.v` is a
    view of them."""

    def __init__(
        self,
        layers: int,
        pages: int,
        page_size: int,
        heads: HeadShape,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
        *,
        layout: str = "NHD",
        k_scale: Scale = None,
        v_scale: Scale = None,
    ):
        self.layers, self.pages, self.page_size = (
            positive("layers", layers),
            positive("pages", pages),
            positive("page_size", page_size),
        )
        self.layout = check_layout(layout)
        if dtype not in KV_DTYPES:
            raise TypeError(
                f"dtype={dtype}: a cache holds one of {', '.join(str(d).removeprefix('torch.') for d in KV_DTYPES)}"
            )
        self.heads, self.dtype = heads, dtype
        self.device = place(torch.get_default_device() if device is None else device)
        self._keys = self._storage(heads.dim)
        self._values = self._keys[..., : heads.value_dim] if heads.latent_value else self._storage(heads.value_dim)
        self.k_scale = make_scale("k_scale", k_scale, pages, heads.kv_heads, self.device)
        self.v_scale = make_scale("v_scale", v_scale, pages, heads.kv_heads, self.device)
        if heads.latent_value and v_scale is None:
            self.v_scale = self.k_scale  # values are keys
        self._kv = [KV(self._keys[i], self._values[i], self.k_scale, self.v_scale, self.layout) for i in range(layers)]
        for kv in self._kv[1:]:
            _set_signature(kv, self._kv[0].signature)  # one object, so that a plan compares layers by identity
        self._made = True

    def __setattr__(self, name: str, value: object) -> None:
        if "_made" in self.__dict__:
            raise AttributeError(f"a cache does not change: make another one with {name}=...")
        super().__setattr__(name, value)

    def _storage(self, width: int) -> torch.Tensor:
        shape = [self.layers, self.pages, self.page_size, self.heads.kv_heads, width]
        if self.layout == "HND":
            shape[2], shape[3] = shape[3], shape[2]
        try:
            storage = torch.zeros(shape, dtype=self.dtype, device=self.device)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            kinds = 1 if self.heads.latent_value else 2
            raise MemoryError(
                f"{self.layers} layers of {self.pages} pages of {self.page_size} tokens take "
                f"{math.prod(shape) * self.dtype.itemsize * kinds / 2**30:,.1f} GiB of keys and values, which "
                f"{self.device} has no room for: take fewer pages ({str(error).partition(chr(10))[0]})"
            ) from None
        return storage.transpose(2, 3) if self.layout == "HND" else storage

    def __getitem__(self, layer: int) -> KV:
        """Layer `layer`'s keys and values; raises IndexError beyond the last layer."""
        try:
            return self._kv[layer]
        except IndexError:
            raise IndexError(f"cache[{layer}]: the cache has {self.layers} layers, numbered from 0") from None
        except TypeError:
            raise TypeError(f"cache[{layer!r}]: give a layer's number, 0 to {self.layers - 1}") from None

    def __len__(self) -> int:
        return self.layers

    @property
    def nbytes(self) -> int:
        """Bytes of storage, scales excluded."""
        values = 0 if self.heads.latent_value else self._values.nelement()
        return (self._keys.nelement() + values) * self._keys.element_size()

    def __repr__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        size = f"{self.layers} layers, {self.pages} pages of {self.page_size}"
        return f"PagedKVCache({size}, {self.heads}, {dtype}, {self.layout}, {self.device})"
