"""Bridges to packages that the library itself does not need, one subpackage each.

Nothing here is imported by ``import riemannian_modules``.
"""
