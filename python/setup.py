"""Nothing is compiled here. Where the checkout has a build, its library travels into the package; so do the example specs."""

import shutil
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

CHECKOUT = Path(__file__).resolve().parent.parent
LIBRARY = CHECKOUT / "build" / "libregraph.so"


class BuildWithLibrary(build_py):
    def run(self):
        super().run()
        package = Path(self.build_lib) / "regraph"
        if LIBRARY.exists():
            shutil.copyfile(LIBRARY.resolve(), package / "libregraph.so")
        if (CHECKOUT / "examples").is_dir():
            (package / "examples" / "policies").mkdir(parents=True, exist_ok=True)
            for file in [*CHECKOUT.glob("examples/*.json"), *CHECKOUT.glob("examples/policies/*.json")]:
                shutil.copyfile(file, package / file.relative_to(CHECKOUT))


class ForThisMachine(Distribution):
    def has_ext_modules(self):  # a wheel with the library in it fits one platform
        return LIBRARY.exists()


setup(cmdclass={"build_py": BuildWithLibrary}, distclass=ForThisMachine)
