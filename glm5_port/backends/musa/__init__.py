from glm5_port.registry import Backend, Probe

BACKEND = Backend(name="musa", title="musa", device_type="musa", package=None, collective="x", order=1, probe=lambda: Probe("stub"))
