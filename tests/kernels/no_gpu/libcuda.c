/* A CUDA driver without a GPU: it takes every kernel that Triton hands it and runs none. */
#include <stddef.h>

typedef unsigned long long address;

static int launches = 0;
int launch_count(void) { return launches; }

int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? 9 : attribute == 76 ? 0 : 232448; /* compute capability 9.0; shared memory */
    return 0;
}
int cuGetErrorString(int error, const char **text) { *text = "no GPU"; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)1; return 0; }
int cuCtxSetCurrent(void *context) { return 0; }
int cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = 0; return 0; }
int cuCtxSetLimit(int limit, size_t value) { return 0; }
int cuCtxGetLimit(size_t *value, int limit) { *value = 1 << 20; return 0; }
int cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
int cuFuncGetAttribute(int *value, int attribute, void *function) { *value = attribute == 0 ? 1024 : 0; return 0; }
int cuFuncSetCacheConfig(void *function, int config) { return 0; }
int cuModuleLoadData(void **module, const void *image) { *module = (void *)2; return 0; }
int cuModuleGetFunction(void **function, void *module, const char *name) { *function = (void *)3; return 0; }
int cuDriverGetVersion(int *version) { *version = 12080; return 0; }
int cuPointerGetAttribute(void *value, int attribute, address pointer) { *(address *)value = pointer; return 0; }
int cuPointerGetAttributes(unsigned count, int *attributes, void **values, address pointer) {
    for (unsigned i = 0; i < count; i++)
        if (attributes[i] == 3) *(address *)values[i] = pointer;
    return 0;
}
int cuLaunchKernelEx(const void *config, void *function, void **parameters, void **extra) { launches++; return 0; }
int cuOccupancyMaxActiveClusters(int *count, void *function, const void *config) { *count = 1; return 0; }
int cuTensorMapEncodeTiled(void) { return 0; }
int cuTensorMapEncodeIm2col(void) { return 0; }
