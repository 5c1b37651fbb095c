from glm5_port.registry import Backend, Probe

BACKEND = Backend(name="iluvatar", title="iluvatar", device_type="iluvatar", package=None, collective="x", order=1, probe=lambda: Probe("stub"))
