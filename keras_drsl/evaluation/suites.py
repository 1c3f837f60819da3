"""The attacks by name, and the suites that they form."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from keras_drsl import _validation
from keras_drsl.attacks import APGD, FGSM, PGD, Attack, FastAPGD, FastSquare, Noise, Square, cleverhans
from keras_drsl.threat import ThreatModel

ATTACKS: dict[str, Callable[..., Attack]] = {
    "fgsm_ce": FGSM,
    "fgsm_margin": partial(FGSM, loss="margin"),
    "pgd_ce": PGD,
    "pgd_margin": partial(PGD, loss="margin"),
    "pgd_dlr": partial(PGD, loss="dlr"),
    "apgd_ce": APGD,
    "apgd_margin": partial(APGD, loss="margin"),
    "apgd_dlr": partial(APGD, loss="dlr"),
    "apgd_js": partial(APGD, loss="js"),
    "apgd_t_ce": partial(APGD, loss="ce", targeted=True),
    "apgd_t_margin": partial(APGD, loss="margin", targeted=True),
    "apgd_t_dlr": partial(APGD, loss="dlr", targeted=True),
    "square": Square,
    "fast_apgd": FastAPGD,
    "fast_square": FastSquare,
    "noise": Noise,
    **{f"cleverhans_{name}": attack for name, attack in cleverhans.BY_NAME.items()},
}
NOT_AVAILABLE = {
    "carlini_wagner_l2": "it stops with an error on Keras 3's optimizers and, patched to run, reports 100 % robust",
    "spsa": "it stops with an error on Keras 3's optimizers and takes one image at a time",
}
SUITES: dict[str, tuple[str | Callable[..., Attack], ...]] = {
    "quick": ("fgsm_ce", partial(PGD, loss="margin", steps=20)),
    "cleverhans": tuple(f"cleverhans_{name}" for name in cleverhans.BY_NAME),
    "fast": ("fast_apgd", "fast_square"),
    "standard": ("apgd_ce", "apgd_t_dlr", "apgd_t_margin", "square"),
}
# For models of positions: attacks with one target for all positions are weak there, and cost one search per class.
SUITES_OF_POSITIONS: dict[str, tuple[str | Callable[..., Attack], ...]] = {
    "quick": SUITES["quick"],
    "standard": ("apgd_ce", "apgd_js", "apgd_margin", "square"),
}
# `"standard"` is AutoAttack with targeted APGD on the margin in place of FAB.
SUITE_ALIASES = {"autoattack": "standard"}


def check_suite(suite: Any) -> str:
    """Return the name of a suite in `SUITES`, or raise `ValueError`."""
    return _validation.check_name("suite", SUITE_ALIASES.get(str(suite).lower(), suite), tuple(SUITES))


def make_attacks(
    suite: str, attacks: Iterable[Any] | None, threat: ThreatModel, seed: int, *, of_positions: bool = False
) -> dict[str, Attack]:
    """Return the attacks of a suite, or those given, by names that tell them apart.

    Args:
        suite: A key of `SUITES`, as `check_suite` returns it.
        attacks: Names or attacks in place of the suite.
        threat: The threat model of the evaluation.
        seed: The seed of attacks given by name.
        of_positions: Whether the suite is for a model of positions.

    Raises:
        ValueError: If an attack is unknown, or an attack was made for another threat model.
    """
    if isinstance(attacks, str | Attack):
        attacks = [attacks]
    made: dict[str, Attack] = {}
    suites = SUITES_OF_POSITIONS if of_positions else SUITES
    if attacks is None and suite not in suites:
        raise ValueError(f"`suite` must be one of {', '.join(suites)} for a model of positions. Received: {suite!r}")
    for item in suites[suite] if attacks is None else attacks:
        attack = item if isinstance(item, Attack) else _find(item)(threat=threat, seed=seed)
        if attack.threat != threat:
            raise ValueError(
                f"`attacks` must be made for {threat}, as the evaluation is. Received: {attack.name} for "
                f"{attack.threat}"
            )
        name, number = attack.name, 2
        while name in made:
            name, number = f"{attack.name}_{number}", number + 1
        made[name] = attack
    if not made:
        raise ValueError("`attacks` must hold at least one attack. Received: none")
    return made


def _find(item: Any) -> Callable[..., Attack]:
    """Return what makes an attack: the entry of a name, or a class or function itself."""
    if isinstance(item, str):
        item = item.lower()
        name = item.removeprefix("cleverhans_")
        if name in NOT_AVAILABLE:
            raise ValueError(f"`attacks` cannot hold {item!r} of cleverhans: {NOT_AVAILABLE[name]}")
        if item not in ATTACKS:
            raise ValueError(f"`attacks` must hold attacks or names of {', '.join(ATTACKS)}. Received: {item!r}")
        return ATTACKS[item]
    if not callable(item):
        raise ValueError(f"`attacks` must hold attacks or their names. Received: {item!r}")
    return item  # type: ignore[no-any-return]
