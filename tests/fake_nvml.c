/* fake_nvml.c - NVML for machines without a GPU: libnvidia-ml.so.1 with one GPU, of fixed figures, at the
 * address of tests/cuda_on_cpu.cpp's device 0. It cannot tell its power, as some GPUs cannot. */
#include <string.h>

enum { SUCCESS, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6 };
static int the_gpu;

int nvmlInit_v2(void) { return SUCCESS; }
int nvmlShutdown(void) { return SUCCESS; }
const char *nvmlErrorString(int status) { return status == NOT_FOUND ? "Not Found" : "Invalid Argument"; }
int nvmlDeviceGetHandleByPciBusId_v2(const char *address, void **device) {
    *device = &the_gpu;
    return strcmp(address, "0000:01:00.0") ? NOT_FOUND : SUCCESS;
}
int nvmlDeviceGetUtilizationRates(void *device, unsigned percent[2]) {
    percent[0] = 87, percent[1] = 40;
    return device == &the_gpu ? SUCCESS : INVALID_ARGUMENT;
}
int nvmlDeviceGetMemoryInfo(void *device, unsigned long long bytes[3]) {
    bytes[0] = 80000000000, bytes[1] = 75000000000, bytes[2] = 5000000000;
    return device == &the_gpu ? SUCCESS : INVALID_ARGUMENT;
}
int nvmlDeviceGetPowerUsage(void *device, unsigned *milliwatts) {
    (void)device, (void)milliwatts;
    return NOT_SUPPORTED;
}
int nvmlDeviceGetTemperature(void *device, int sensor, unsigned *celsius) {
    *celsius = 61;
    return device == &the_gpu && sensor == 0 ? SUCCESS : INVALID_ARGUMENT;
}
