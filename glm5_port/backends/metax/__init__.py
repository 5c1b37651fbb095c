from glm5_port.registry import Backend, Probe

BACKEND = Backend(name="metax", title="metax", device_type="metax", package=None, collective="x", order=1, probe=lambda: Probe("stub"))
