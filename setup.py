"""The list of packages: the folder `src` is the package `unispec` itself.

pyproject.toml holds everything else; its own package finder cannot add a prefix.
"""

from setuptools import find_packages, setup

setup(packages=["unispec", *(f"unispec.{package}" for package in find_packages("src"))])
