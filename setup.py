"""Takes data/toonfaces along in the wheel, as cfclip/data/toonfaces. All else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["cfclip*"]), "cfclip.data.toonfaces"],
    package_dir={"cfclip.data.toonfaces": "data/toonfaces"},
)
