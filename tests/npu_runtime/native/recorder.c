// The kernels of the stand-in runtime: every aclnn function records its call, and refuses unless a body has asked for it.
//
// torch_npu describes each argument with aclCreate*, then calls aclnn<Name>GetWorkspaceSize and aclnn<Name>. The description is
// complete (dtype, view, strides, offset, format, storage), so recording it needs no knowledge of any kernel's signature. The
// generated part of the library is one line for each kernel, `KERNEL(name)`. Log: one JSON array for each event, one event a line.

#include <inttypes.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, NO_BODY = 561003, BAD_FORMAT = 161002, MAX_DIMENSIONS = 10, FORMAT_ND = 2, FORMAT_NZ = 29, LONGEST_LOG = 1 << 26, MAX_KERNELS = 2048 };

// -- the log ----------------------------------------------------------------------------------------------------------

static char *text = NULL;
static size_t used = 0, room = 0;

static void write_text(const char *format, ...) {
  if (used > LONGEST_LOG) return;  // nobody has taken it: see stand_in_take_log
  if (room - used < 512) text = realloc(text, room = 2 * room + 4096);
  va_list arguments;
  va_start(arguments, format);
  used += (size_t)vsnprintf(text + used, room - used, format, arguments);
  va_end(arguments);
}

static void write_integers(const int64_t *values, uint64_t count) {
  write_text("[");
  for (uint64_t i = 0; i < count; i++) write_text("%s%" PRId64, i ? "," : "", values[i]);
  write_text("]");
}

const char *stand_in_take_log(void) {
  if (!text) return "";
  if (used > LONGEST_LOG) {
    used = 0;
    return "[\"overflow\"]";
  }
  text[used] = 0;
  used = 0;
  return text;
}

// -- which kernels may run: set by a body around the vendor's front end -----------------------------------------------

static char armed[4096] = "";

void stand_in_arm(const char *kernels) { snprintf(armed, sizeof armed, ",%s,", kernels); }

// -- how often each kernel was asked for ------------------------------------------------------------------------------

static struct {
  const char *name;
  long calls;
} counts[MAX_KERNELS];

static void count(const char *name) {
  int place = 0;
  while (place + 1 < MAX_KERNELS && counts[place].name && strcmp(counts[place].name, name)) place++;
  counts[place].name = name;
  counts[place].calls++;
}

const char *stand_in_counted(int place, long *calls) {
  if (place >= MAX_KERNELS || !counts[place].name) return NULL;
  *calls = counts[place].calls;
  return counts[place].name;
}

static int launch(const char *name) {
  char kernel[256];
  snprintf(kernel, sizeof kernel, ",%s", name);
  char *suffix = strstr(kernel, "GetWorkspaceSize");
  if (suffix) *suffix = 0;
  else count(name);
  strcat(kernel, ",");
  bool allowed = strstr(armed, kernel) != NULL;
  if (suffix) write_text("[\"kernel\",\"%.*s\",%s]\n", (int)strlen(kernel) - 2, kernel + 1, allowed ? "true" : "false");
  return allowed ? SUCCESS : NO_BODY;
}

#define KERNEL(name) \
  int name(void) { return launch(#name); }

// -- arguments --------------------------------------------------------------------------------------------------------

typedef struct {
  int dtype, format;
  uint64_t dimensions, storage_dimensions;
  int64_t shape[MAX_DIMENSIONS], storage[MAX_DIMENSIONS];
  char *data;
} Tensor;

void *aclCreateTensor(const int64_t *shape, uint64_t dimensions, int dtype, const int64_t *strides, int64_t offset, int format,
                      const int64_t *storage, uint64_t storage_dimensions, void *data) {
  write_text("[\"tensor\",%d,", dtype);
  write_integers(shape, dimensions);
  write_text(",");
  write_integers(strides, dimensions);
  write_text(",%" PRId64 ",%d,", offset, format);
  write_integers(storage, storage_dimensions);
  write_text("]\n");
  Tensor *tensor = calloc(1, sizeof *tensor);
  *tensor = (Tensor){.dtype = dtype, .format = format, .dimensions = dimensions, .storage_dimensions = storage_dimensions, .data = data};
  memcpy(tensor->shape, shape, (dimensions < MAX_DIMENSIONS ? dimensions : MAX_DIMENSIONS) * sizeof *shape);
  memcpy(tensor->storage, storage, (storage_dimensions < MAX_DIMENSIONS ? storage_dimensions : MAX_DIMENSIONS) * sizeof *storage);
  return tensor;
}

static void *note(const char *kind, uint64_t count) {
  write_text("[\"%s\",%" PRIu64 "]\n", kind, count);
  return calloc(1, 16);
}

void *aclCreateScalar(void *value, int dtype) { return note("scalar", (uint64_t)dtype); }
void *aclCreateFloatArray(const float *values, uint64_t count) { return note("floats", count); }
void *aclCreateBoolArray(const bool *values, uint64_t count) { return note("bools", count); }
void *aclCreateTensorList(void **tensors, uint64_t count) { return note("tensor list", count); }
void *aclCreateScalarList(void **scalars, uint64_t count) { return note("scalar list", count); }

void *aclCreateIntArray(const int64_t *values, uint64_t count) {
  write_text("[\"integers\",");
  write_integers(values, count);
  write_text("]\n");
  return calloc(1, 16);
}

static int destroy(void *handle) {
  free(handle);
  return SUCCESS;
}

int aclDestroyTensor(void *handle) { return destroy(handle); }
int aclDestroyScalar(void *handle) { return destroy(handle); }
int aclDestroyIntArray(void *handle) { return destroy(handle); }
int aclDestroyFloatArray(void *handle) { return destroy(handle); }
int aclDestroyBoolArray(void *handle) { return destroy(handle); }
int aclDestroyTensorList(void *handle) { return destroy(handle); }
int aclDestroyScalarList(void *handle) { return destroy(handle); }

// -- FRACTAL_NZ: the one kernel that computes here, because the layout must be real -------------------------------------
//
// [..., K, N] lies as [..., ceil(N / C0), ceil(K / 16), 16, C0], C0 = 32 bytes; the padding is poison.

static int64_t element_bytes(int dtype) {
  switch (dtype) {
    case 0: case 3: case 8: return 4;            // float32, int32, uint32
    case 1: case 6: case 7: case 27: return 2;   // float16, int16, uint16, bfloat16
    case 9: case 10: case 11: return 8;          // int64, uint64, float64
    default: return 1;
  }
}

int aclnnNpuFormatCastCalculateSizeAndFormat(const Tensor *source, int format, int as_dtype, int64_t **shape, uint64_t *dimensions,
                                             int *actual_format) {
  uint64_t last = source->dimensions;
  bool known = format == FORMAT_ND || (format == FORMAT_NZ && last >= 2 && last + 2 <= MAX_DIMENSIONS);
  write_text("[\"kernel\",\"aclnnNpuFormatCastCalculateSizeAndFormat\",%s]\n", known ? "true" : "false");
  if (!known) return BAD_FORMAT;
  int64_t *result = malloc(MAX_DIMENSIONS * sizeof *result);
  memcpy(result, source->shape, sizeof source->shape);
  if (format == FORMAT_NZ) {
    int64_t columns = 32 / element_bytes(as_dtype >= 0 ? as_dtype : source->dtype);
    result[last - 2] = (source->shape[last - 1] + columns - 1) / columns;
    result[last - 1] = (source->shape[last - 2] + 15) / 16;
    result[last] = 16;
    result[last + 1] = columns;
  }
  *shape = result;
  *dimensions = format == FORMAT_NZ ? last + 2 : last;
  *actual_format = format;
  return SUCCESS;
}

static const Tensor *cast_from, *cast_to;

int aclnnNpuFormatCastGetWorkspaceSize(const Tensor *source, const Tensor *target, uint64_t *workspace, void **executor) {
  cast_from = source;
  cast_to = target;
  *workspace = 0;
  write_text("[\"kernel\",\"aclnnNpuFormatCast\",true]\n");
  return SUCCESS;
}

int aclnnNpuFormatCast(void *workspace, uint64_t bytes, void *executor, void *stream) {
  bool to_nz = cast_to->format == FORMAT_NZ;
  if (to_nz == (cast_from->format == FORMAT_NZ)) return BAD_FORMAT;
  const Tensor *plain = to_nz ? cast_from : cast_to, *fractal = to_nz ? cast_to : cast_from;
  const int64_t *blocks = fractal->storage + fractal->storage_dimensions - 4;
  int64_t rows = plain->shape[plain->dimensions - 2], columns = plain->shape[plain->dimensions - 1], matrices = 1;
  int64_t size = element_bytes(plain->dtype), fractal_elements = blocks[0] * blocks[1] * blocks[2] * blocks[3];
  for (uint64_t i = 0; i + 2 < plain->dimensions; i++) matrices *= plain->shape[i];
  if (to_nz) memset(fractal->data, 0xA5, (size_t)(matrices * fractal_elements * size));
  for (int64_t matrix = 0; matrix < matrices; matrix++)
    for (int64_t row = 0; row < rows; row++)
      for (int64_t column = 0; column < columns; column++) {
        char *a = plain->data + ((matrix * rows + row) * columns + column) * size;
        int64_t block = (column / blocks[3]) * blocks[1] + row / 16;
        char *b = fractal->data + (matrix * fractal_elements + (block * 16 + row % 16) * blocks[3] + column % blocks[3]) * size;
        memcpy(to_nz ? b : a, to_nz ? a : b, (size_t)size);
      }
  return SUCCESS;
}
