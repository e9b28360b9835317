"""What a network looks at: modulation weights, class activation, receptive fields, kernels.

- ``maps``: the weights A of Eq. 4 and the modulated values A * V of chosen blocks, over the image.
- ``cams``: class activation maps, computed by the library pytorch-grad-cam.
- ``receptive_field``: how far from the centre of a map the pixels lie that change it.
- ``kernels``: the learned depthwise kernels.
"""
