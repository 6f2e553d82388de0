"""The models of a study: the bundled ones, or others by name."""

from __future__ import annotations

from dataclasses import dataclass

from nla_engine.demo.run import LAYER, TRIO


@dataclass(frozen=True)
class Models:
    """base, av, ar: directories or Hub ids. layer: the one AV and AR were made for. bundled: the package's own."""

    base: str
    av: str
    ar: str
    layer: int
    bundled: bool

    @classmethod
    def named(cls, base: str | None, av: str | None, ar: str | None, layer: int | None) -> Models:
        """The models by these names; None for the bundled one."""
        return cls(
            str(base or TRIO / "base"),
            str(av or TRIO / "av"),
            str(ar or TRIO / "ar"),
            LAYER if layer is None else layer,
            bundled=base is None,
        )
