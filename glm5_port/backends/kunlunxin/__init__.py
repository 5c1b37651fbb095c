from glm5_port.registry import Backend, Probe

BACKEND = Backend(name="kunlunxin", title="kunlunxin", device_type="kunlunxin", package=None, collective="x", order=1, probe=lambda: Probe("stub"))
