"""Log-gamma and digamma without cancellation, in float32 as in float64, for any argument above zero.

Counts make small differences of large terms: ``lgamma(x + theta) - lgamma(theta)`` is 0 in float32 at ``theta = 1e8``,
where the truth for ``x = 3`` is 55.3. Every function here is written in terms that do not cancel, with bounds in place
of branches, which cost more on a CPU than what they save. None waits for the device.
"""

from __future__ import annotations

import torch

# Arguments are raised by a shift to where a polynomial in their inverse square holds; the first coefficients, and in
# float64 all of them, are those of the asymptotic series. In float32 the others are fitted for arguments above 1: the
# first polynomial to 7e-8, the second to 3e-7 of the difference of digammas that it serves.
_SHIFT = {torch.float32: 1, torch.float64: 10}
_LGAMMA = {
    torch.float32: (1 / 12, -2.77074969e-3, 7.2065349e-4, -2.96678118e-4, 7.49740094e-5),
    torch.float64: (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188, -691 / 360360, 1 / 156),
}
_DIGAMMA = {
    torch.float32: (1 / 12, -8.31553551e-3, 3.65043508e-3, -2.21321271e-3, 7.79291418e-4),
    torch.float64: (1 / 12, -1 / 120, 1 / 252, -1 / 240, 1 / 132, -691 / 32760, 1 / 12),
}
# Terms of log1p's series in v = t / (2 + t) after the first; |v| is at most 1/9 for 1 + t between 4/5 and 5/4.
_ATANH = {torch.float32: 3, torch.float64: 7}


def log_rising_factorial(x: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    r"""``lgamma(x + theta) - lgamma(theta)``, without the cancellation of its terms, for any theta > 0.

    The recurrence :math:`\Gamma(z) = \Gamma(z + m) / (z (z+1) \cdots (z+m-1))` raises both arguments by :math:`m`, to
    where Stirling's formula with corrections is exact to 7e-8 in float32 (m = 1) and to rounding in float64 (m = 10);
    its leading terms are subtracted in closed form.
    """
    shift = _SHIFT[theta.dtype]
    start = theta + shift
    end = start + x
    u, v = 1 / start, 1 / end
    steps = theta / (theta + x)
    for k in range(1, shift):
        steps = steps * ((theta + k) / (theta + x + k))
    corrections = _lgamma_correction(v) - _lgamma_correction(u)
    return (start - 0.5) * torch.log1p(x * u) + x * (end.log() - 1) + corrections + steps.log()


def digamma_difference(x: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    """``digamma(x + theta) - digamma(theta)``: the derivative of :func:`log_rising_factorial` in theta."""
    start = theta + _SHIFT[theta.dtype]
    u = 1 / start
    return torch.log1p(x * u) + _digamma_remainder(x, theta, u, 1 / (start + x))


def digamma_excess(x: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    r"""``digamma(x + theta) - digamma(theta) - log((x + theta) / theta)``, for x and theta > 0.

    About :math:`x / (2 \theta (x + \theta))`. At large theta this is a vanishing part of :func:`digamma_difference`,
    and all that the logarithm leaves of it in the derivative of a negative binomial.
    """
    shift = _SHIFT[theta.dtype]
    start = theta + shift
    u = 1 / start
    # log(1 + x / start) - log(1 + x / theta). The bound acts where the remainder, 1 / theta, is far larger.
    raised = (x * u / (x + theta)).mul_(-shift).clamp_(min=torch.finfo(theta.dtype).eps - 1).log1p_()
    return raised.add_(_digamma_remainder(x, theta, u, 1 / (start + x)))


def stirling_error(z: torch.Tensor) -> torch.Tensor:
    r"""What Stirling's formula leaves of log-gamma, for any z > 0.

    .. math:: S(z) = \log\Gamma(z) - (z - \tfrac12)\log z + z - \tfrac12\log 2\pi \approx \frac{1}{12 z}

    With it the terms of a probability that cancel can be taken out in closed form (Loader 2000, *Fast and accurate
    computation of binomial probabilities*).
    """
    shift = _SHIFT[z.dtype]
    u = 1 / (z + shift)
    result = (shift / z).log1p_().mul_(z + 0.5)
    for k in range(1, shift):
        result.sub_((z + k).mul_(u).log_())
    return result.sub_(shift).add_(_lgamma_correction(u))


def log1p_excess(t: torch.Tensor, ratio: torch.Tensor) -> torch.Tensor:
    r"""``t - log(1 + t)``, about :math:`t^2 / 2`, without cancellation for any t > -1.

    Parameters
    ----------
    t
        Deviation.
    ratio
        ``1 + t``, computed apart from ``t``, which no longer knows it where it is close to -1.

    Notes
    -----
    Between 4/5 and 5/4 by :math:`\log(1 + t) = 2 (v + v^3/3 + v^5/5 + \dots)`, :math:`v = t / (2 + t)`; beyond, the
    logarithm of what ``ratio`` exceeds a bound by, exactly 0 between them, is added.
    """
    near = t.clamp(-0.2, 0.25)
    v = near / (near + 2)
    square = v * v
    n = _ATANH[t.dtype]
    tail = square * (2 / (2 * n + 1))
    for k in range(n - 1, 0, -1):
        tail.add_(2 / (2 * k + 1)).mul_(square)
    beyond = (t - near).sub_(ratio.clamp(max=0.8).mul_(ratio.clamp(min=1.25)).log_())
    return beyond.addcmul_(near.sub_(tail), v)


def _lgamma_correction(u: torch.Tensor) -> torch.Tensor:
    """What Stirling's formula leaves of log-gamma at ``1 / u``, where that is not less than the shift."""
    return _polynomial(u * u, _LGAMMA[u.dtype]).mul_(u)


def _digamma_remainder(x: torch.Tensor, theta: torch.Tensor, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """``digamma(x + theta) - digamma(theta) - log(u / v)``, where u and v are one over the raised arguments.

    The first correction of digamma, ``-u / 2``, is subtracted in closed form.
    """
    result = (x * u).mul_(v).mul_(0.5)
    for k in range(_SHIFT[u.dtype]):
        low = theta + k
        result.addcdiv_(x, (low + x).mul_(low))
    for argument, sign in ((u, 1), (v, -1)):
        square = argument * argument
        result.addcmul_(_polynomial(square, _DIGAMMA[u.dtype]), square, value=sign)
    return result


def _polynomial(x: torch.Tensor, coefficients: tuple[float, ...]) -> torch.Tensor:
    """Horner's scheme, lowest coefficient first."""
    result = x * coefficients[-1]
    for coefficient in coefficients[-2:0:-1]:
        result.add_(coefficient).mul_(x)
    return result.add_(coefficients[0])
