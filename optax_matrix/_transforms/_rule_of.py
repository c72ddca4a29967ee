"""The rule that the settings of a preconditioner stand for."""

from optax_matrix._transforms._eigenbases import SOAP
from optax_matrix._transforms._kl import KL, KLRule
from optax_matrix._transforms._preconditioner import MatrixRule, Preconditioner
from optax_matrix._transforms._soap import SoapRule
from optax_matrix._transforms.shampoo_precondition import Shampoo, ShampooRule


def rule_of(settings: Preconditioner, mu_dtype: str | None = None) -> MatrixRule:
    """Returns the rule of an optimizer with default arguments and these settings."""
    if isinstance(settings, Shampoo):
        return ShampooRule(
            settings, with_momentum=True, summed=False, mu_dtype=mu_dtype
        )
    if isinstance(settings, KL):
        return KLRule(settings, mu_dtype, with_variance=True)
    if isinstance(settings, SOAP):
        return SoapRule(settings, mu_dtype)
    raise TypeError(
        "`method` must be the settings of a preconditioner, such as `SOAP()`, got "
        f"{settings!r}."
    )
