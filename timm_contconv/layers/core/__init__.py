"""What the methods share.

- `replacement`: ConvReplacement, what patching, training and saving may ask of every layer
- `kernel`, `kernel_conv`: Kernel, parameters in and dense kernel out; KernelConv1d, 2d and 3d, which convolve with it
- `geometry`: parameters that say where a kernel reaches; layers can share them
- `spec`: LayerSpec and KernelSpec, the settings of a method; `METHODS`, all specs by name
- `kept`: a kernel that is kept outside training
- `compilation`, `tracing`: kernels under torch.compile, layers under torch.fx
- `shown`: what pictures show of a layer
- `plain`, `padding`: plain convolutions, and padding that they can't do
- `least_squares`: fits of kernels to kernels
- `arguments`, `finite`: checks of arguments and of parameters
"""
