"""Native CPU kernels at GLM-5 widths, beside the machine's own limits and the kernels that a user could take instead."""
