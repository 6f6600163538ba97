// The counting allocator, for device.cc.
#pragma once

#include "shim.h"

// Puts the allocator in place of libtorch's. What was allocated before keeps its own way of being freed.
void count_cpu_memory();
// What this thread has allocated and not freed; below zero when it freed what others allocated.
CoevalMemory cpu_memory();
void reset_cpu_peak();
