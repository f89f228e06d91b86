import torch
from jaxtyping import install_import_hook

import tests.typecheck  # noqa: F401 - jaxtyping looks the checker up by this name

torch.set_num_threads(1)  # five times faster on tiny models, and the same bits everywhere
install_import_hook("expunge", "tests.typecheck.check")
