"""Least squares with standard errors, for robot/calibrate.py."""

import numpy as np


def least_squares(errors, x: np.ndarray, iterations: int = 100):
    """Levenberg and Marquardt's method: the x (P,) that minimises the sum of errors(x)**2.

    Returns x, its errors (N,), and the standard errors of x (P,).
    """
    error = errors(x)
    damping = 1e-3
    for _ in range(iterations):
        jacobian = differentiate(errors, x)  # (N, P)
        lengths = np.linalg.norm(jacobian, axis=0)
        damped = np.concatenate([jacobian, np.diag(np.sqrt(damping) * lengths)])
        residual = np.concatenate([-error, np.zeros(len(x))])
        step = np.linalg.lstsq(damped, residual, rcond=None)[0]
        new_error = errors(x + step)
        before = error @ error
        after = new_error @ new_error
        if after < before:
            x = x + step
            error = new_error
            damping /= 10
        else:
            damping *= 10
        if abs(before - after) <= 1e-10 * before:
            break
    triangle = np.linalg.qr(differentiate(errors, x), mode="r")
    variance = (np.linalg.inv(triangle) ** 2).sum(axis=1)  # of errors with variance 1
    variance *= (error @ error) / (len(error) - len(x))
    return x, error, np.sqrt(variance)


def differentiate(errors, x: np.ndarray, h: float = 1e-6) -> np.ndarray:
    """The Jacobian (N, P) of errors(x), by central differences."""
    columns = []
    for i in range(len(x)):
        shift = h * np.eye(len(x))[i]
        columns.append((errors(x + shift) - errors(x - shift)) / (2 * h))
    return np.stack(columns, axis=1)
