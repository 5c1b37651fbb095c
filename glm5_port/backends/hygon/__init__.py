from glm5_port.registry import Backend, Probe

BACKEND = Backend(name="hygon", title="hygon", device_type="hygon", package=None, collective="x", order=1, probe=lambda: Probe("stub"))
