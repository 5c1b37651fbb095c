"""What the vendor's fused operators compute on the stand-in device."""


def install(machine):
    pass
