"""What holds for all tests, before any of them imports torch."""

import os

# what another state of the package compiled may call operators of other arguments
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
