from glm5_port.registry import Backend, Probe

BACKEND = Backend(name="mlu", title="mlu", device_type="mlu", package=None, collective="x", order=1, probe=lambda: Probe("stub"))
