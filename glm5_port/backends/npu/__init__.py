from glm5_port.registry import Backend, Probe

BACKEND = Backend(name="npu", title="npu", device_type="npu", package=None, collective="x", order=1, probe=lambda: Probe("stub"))
