#pragma once

// Entry points that TensorRT's plugin registry looks up by name; everything else in the library is hidden.
#define RELAY_EXPORT extern "C" __attribute__((visibility("default")))
