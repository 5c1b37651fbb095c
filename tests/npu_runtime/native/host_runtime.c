// The device of the stand-in runtime: its memory is host memory, its streams are always idle.
//
// Only functions whose result torch_npu reads are here; libraries.py generates the rest, which return 0. No header of CANN is used:
// these are plain C functions that torch_npu calls by name.

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, OUT_OF_MEMORY = 207001, REFUSED = 500002, POISON = 0xA5 };

static char chip[64] = "Ascend910B2";
static char cann[128] = "9.1.0";
static int device_count = 1;
static __thread int32_t current_device = 0;
static uintptr_t next_handle = 0x2000;

// -- set by machine.py before torch_npu is imported -------------------------------------------------------------------

void stand_in_describe(const char *chip_name, const char *cann_version, int devices) {
  snprintf(chip, sizeof chip, "%s", chip_name);
  snprintf(cann, sizeof cann, "%s", cann_version);
  device_count = devices;
}

// -- devices and contexts ---------------------------------------------------------------------------------------------

const char *aclrtGetSocName(void) { return chip; }

int aclrtGetDeviceCount(uint32_t *count) {
  *count = (uint32_t)device_count;
  return SUCCESS;
}

int aclrtGetDevice(int32_t *device) {
  *device = current_device;
  return SUCCESS;
}

int aclrtSetDevice(int32_t device) {
  current_device = device;
  return SUCCESS;
}

int aclrtGetCurrentContext(void **context) {
  *context = (void *)(uintptr_t)(0x1000 + current_device);
  return SUCCESS;
}

// -- memory: what nobody has written yet holds poison -----------------------------------------------------------------

static int allocate(void **pointer, size_t bytes, size_t alignment) {
  *pointer = NULL;
  if (posix_memalign(pointer, alignment, bytes ? bytes : alignment)) return OUT_OF_MEMORY;
  memset(*pointer, POISON, bytes);
  return SUCCESS;
}

int aclrtMalloc(void **pointer, size_t bytes, int policy) { return allocate(pointer, bytes, 512); }
int aclrtMallocAlign32(void **pointer, size_t bytes, int policy) { return allocate(pointer, bytes, 512); }
int aclrtMallocHost(void **pointer, size_t bytes) { return allocate(pointer, bytes, 64); }

int aclrtFree(void *pointer) {
  free(pointer);
  return SUCCESS;
}

int aclrtFreeHost(void *pointer) {
  free(pointer);
  return SUCCESS;
}

int aclrtGetMemInfo(int kind, size_t *free_bytes, size_t *total_bytes) {
  *free_bytes = *total_bytes = (size_t)64 << 30;
  return SUCCESS;
}

int aclrtMemcpy(void *to, size_t room, const void *from, size_t bytes, int kind) {
  memmove(to, from, bytes);
  return SUCCESS;
}

int aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t bytes, int kind, void *stream) {
  memmove(to, from, bytes);
  return SUCCESS;
}

int aclrtMemset(void *to, size_t room, int32_t value, size_t bytes) {
  memset(to, value, bytes);
  return SUCCESS;
}

int aclrtMemsetAsync(void *to, size_t room, int32_t value, size_t bytes, void *stream) {
  memset(to, value, bytes);
  return SUCCESS;
}

// -- streams and events: handles that differ, work that is always done ------------------------------------------------

static int new_handle(void **handle) {
  *handle = (void *)(next_handle += 16);
  return SUCCESS;
}

int aclrtCreateStream(void **stream) { return new_handle(stream); }
int aclrtCreateStreamWithConfig(void **stream, uint32_t priority, uint32_t flag) { return new_handle(stream); }
int aclrtCreateEvent(void **event) { return new_handle(event); }
int aclrtCreateEventWithFlag(void **event, uint32_t flag) { return new_handle(event); }
int aclrtCreateEventExWithFlag(void **event, uint32_t flag) { return new_handle(event); }

int aclrtEventElapsedTime(float *milliseconds, void *from, void *to) {
  *milliseconds = 0.001f;
  return SUCCESS;
}

static int done(int *status) {
  *status = 1;
  return SUCCESS;
}

int aclrtQueryEventStatus(void *event, int *status) { return done(status); }
int aclrtQueryEventWaitStatus(void *event, int *status) { return done(status); }
int aclrtStreamQuery(void *stream, int *status) { return done(status); }

// -- options and versions ---------------------------------------------------------------------------------------------

size_t aclGetCompileoptSize(int option) { return 16; }

int aclGetCompileopt(int option, char *value, size_t room) {
  strncpy(value, "disable", room);
  return SUCCESS;
}

int aclrtGetSysParamOpt(int option, int64_t *value) {
  *value = 0;
  return SUCCESS;
}

int aclsysGetCANNVersion(int package, char *version) {  // a structure whose first 128 bytes are the version
  strncpy(version, cann, 127);
  return SUCCESS;
}

int aclsysGetVersionStr(char *package, char *version) {
  strncpy(version, cann, 127);
  return SUCCESS;
}

// -- errors; the older way of launching kernels is refused ------------------------------------------------------------

const char *aclGetRecentErrMsg(void) { return "the stand-in runtime has no body for this kernel"; }
int aclopCompileAndExecute(void) { return REFUSED; }
int aclopCompileAndExecuteV2(void) { return REFUSED; }
