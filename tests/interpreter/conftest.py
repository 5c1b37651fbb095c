"""These tests need TRITON_INTERPRET=1 from the start of the process, and then no kernel can be compiled: an ordinary run leaves
them out, and `make test-interpreter` (part of `make test`) runs them."""

from glm5_port.backends.cuda.triton_support import interpreted

collect_ignore_glob = [] if interpreted() else ["*"]
