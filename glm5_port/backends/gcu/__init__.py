from glm5_port.registry import Backend, Probe

BACKEND = Backend(name="gcu", title="gcu", device_type="gcu", package=None, collective="x", order=1, probe=lambda: Probe("stub"))
