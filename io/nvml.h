/* nvml.h - how a GPU is doing: utilisation, memory, power, temperature, by NVIDIA's management library, which
 * comes with the driver and is loaded while the program runs.
 *
 *     nvml n;
 *     if (nvml_open(&n, "0000:17:00.0", &e)) ...       // e: why there are no figures
 *     nvml_figures f = nvml_read(&n);                  // NAN: the GPU does not tell
 *     nvml_close(&n);
 *
 * Declarations after NVIDIA's NVML API reference, as CUDA comes without nvml.h.
 */
#ifndef IO_NVML_H
#define IO_NVML_H

#include <dlfcn.h>
#include <math.h>
#include <string.h>

#include "base.h"

typedef struct nvml_figures {
    double utilization;    /* fraction of the last sampling period in which a kernel ran */
    uint64_t memory_bytes; /* in use, by all processes; 0: the GPU does not tell */
    double power_w, temperature_c;
} nvml_figures;

typedef struct nvml {
    void *library, *device; /* NULL: not open */
    int (*init)(void), (*shutdown)(void);
    const char *(*error)(int);
    int (*by_address)(const char *address, void **device);
    int (*utilization)(void *device, unsigned percent[2]);    /* kernels, memory */
    int (*memory)(void *device, unsigned long long bytes[3]); /* total, free, used */
    int (*power)(void *device, unsigned *milliwatts);
    int (*temperature)(void *device, int sensor, unsigned *celsius); /* sensor 0: the GPU itself */
} nvml;

static inline void nvml_close(nvml *n) {
    if (n->device) n->shutdown();
    if (n->library) dlclose(n->library);
    *n = (nvml){0};
}

/* The GPU at a PCI address, as cudaDeviceGetPCIBusId gives it. -1: e says why there are no figures. */
static inline int nvml_open(nvml *n, const char *address, error_text *e) {
    *n = (nvml){.library = dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL)};
    if (!n->library) return error_set(e, "NVML: %s", dlerror());
    const struct {
        const char *name;
        void *function; /* where its address goes; ISO C has no cast from dlsym's void * */
    } needed[] = {{"nvmlInit_v2", &n->init},
                  {"nvmlShutdown", &n->shutdown},
                  {"nvmlErrorString", &n->error},
                  {"nvmlDeviceGetHandleByPciBusId_v2", &n->by_address},
                  {"nvmlDeviceGetUtilizationRates", &n->utilization},
                  {"nvmlDeviceGetMemoryInfo", &n->memory},
                  {"nvmlDeviceGetPowerUsage", &n->power},
                  {"nvmlDeviceGetTemperature", &n->temperature}};
    for (size_t i = 0; i < sizeof needed / sizeof *needed; i++) {
        void *function = dlsym(n->library, needed[i].name);
        if (!function) {
            nvml_close(n);
            return error_set(e, "NVML: found no function %s in libnvidia-ml.so.1", needed[i].name);
        }
        memcpy(needed[i].function, &function, sizeof function);
    }
    int status = n->init();
    if (!status && (status = n->by_address(address, &n->device))) n->shutdown();
    if (!status) return 0;
    error_set(e, "NVML: GPU %s: %s", address, n->error(status));
    n->device = NULL;
    nvml_close(n);
    return -1;
}

static inline nvml_figures nvml_read(const nvml *n) {
    unsigned percent[2], milliwatts, celsius;
    unsigned long long bytes[3];
    nvml_figures f = {NAN, 0, NAN, NAN};
    if (!n->utilization(n->device, percent)) f.utilization = percent[0] / 100.0;
    if (!n->memory(n->device, bytes)) f.memory_bytes = bytes[2];
    if (!n->power(n->device, &milliwatts)) f.power_w = milliwatts / 1000.0;
    if (!n->temperature(n->device, 0, &celsius)) f.temperature_c = celsius;
    return f;
}

#endif
