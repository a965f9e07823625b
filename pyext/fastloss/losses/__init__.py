"""One file per loss: validation, fake kernels, autograd, function, module."""
