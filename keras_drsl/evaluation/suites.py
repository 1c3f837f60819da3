"""The attacks by name, and the suites they make up."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from keras_drsl.attacks import APGD, FGSM, PGD, Attack, Noise, Square, cleverhans

ATTACKS: dict[str, Callable[..., Attack]] = {
    "fgsm_ce": FGSM,
    "fgsm_margin": partial(FGSM, loss="margin"),
    "pgd_ce": PGD,
    "pgd_margin": partial(PGD, loss="margin"),
    "pgd_dlr": partial(PGD, loss="dlr"),
    "apgd_ce": APGD,
    "apgd_margin": partial(APGD, loss="margin"),
    "apgd_dlr": partial(APGD, loss="dlr"),
    "apgd_t_ce": partial(APGD, loss="ce", targeted=True),
    "apgd_t_margin": partial(APGD, loss="margin", targeted=True),
    "apgd_t_dlr": partial(APGD, loss="dlr", targeted=True),
    "square": Square,
    "noise": Noise,
}
NOT_OFFERED = {
    "carlini_wagner_l2": cleverhans.NOT_OFFERED["CarliniWagnerL2"],
    "spsa": cleverhans.NOT_OFFERED["SPSA"],
}
SUITES = {
    "quick": ("fgsm_ce", partial(PGD, loss="margin", steps=20)),
    "cleverhans": tuple(f"cleverhans_{name}" for name in cleverhans.BY_NAME),
    "standard": ("apgd_ce", "apgd_t_dlr", "apgd_t_margin", "square"),
}


def make_attacks(suite: str, attacks: Iterable[Any] | None, threat: dict[str, Any], seed: int) -> dict[str, Attack]:
    """The attacks of a suite, or those given, by names that tell them apart.

    Args:
        suite: a key of `SUITES`.
        attacks: names or attacks in place of the suite.
        threat: `eps`, `norm`, `clip_min` and `clip_max`.
        seed: the seed of attacks given by name.

    Raises:
        ValueError: for an unknown suite or attack, or an attack made for another threat.
    """
    if suite not in SUITES:
        raise ValueError(f"`suite` must be one of {', '.join(map(repr, SUITES))}. Received: suite={suite!r}")
    if isinstance(attacks, str | Attack):
        attacks = [attacks]
    made: dict[str, Attack] = {}
    for one in SUITES[suite] if attacks is None else attacks:
        attack = one if isinstance(one, Attack) else _make(one, threat, seed)
        for key, value in threat.items():
            if getattr(attack, key) != value:
                raise ValueError(
                    f"`attacks` must be made for `{key}={value!r}`, as the evaluation is. "
                    f"Received: {attack.name} with {key}={getattr(attack, key)!r}"
                )
        name, place = attack.name, 2
        while name in made:
            name, place = f"{attack.name}_{place}", place + 1
        made[name] = attack
    if not made:
        raise ValueError("`attacks` must hold at least one attack. Received: none")
    return made


def _make(one: Any, threat: dict[str, Any], seed: int) -> Attack:
    if isinstance(one, str):
        name = one.removeprefix("cleverhans_")
        if name in NOT_OFFERED:
            raise ValueError(f"`attacks` cannot hold {one!r} of cleverhans: {NOT_OFFERED[name]}")
        if one.startswith("cleverhans_") and name in cleverhans.BY_NAME:
            one = cleverhans.BY_NAME[name]
        elif one in ATTACKS:
            one = ATTACKS[one]
        else:
            known = [*ATTACKS, *SUITES["cleverhans"]]
            raise ValueError(f"`attacks` must hold attacks or names of {', '.join(map(str, known))}. Received: {one!r}")
    elif not callable(one):
        raise ValueError(f"`attacks` must hold attacks or their names. Received: {one!r}")
    attack = one(**threat)
    attack.seed = seed
    return attack
