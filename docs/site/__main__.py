"""`python -m docs.site`: builds the site into build/site, strictly. A broken link ends it with exit code 1."""

import sys

from docs.site.build import REPOSITORY, build

if __name__ == "__main__":
    sys.exit(build(REPOSITORY / "build" / "site"))
