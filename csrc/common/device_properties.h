// What a launch policy needs to know of a GPU. Host C++, no CUDA.
#pragma once

namespace fastloss {

struct DeviceProperties {
  int sm = 0;  // compute capability, major * 10 + minor; 0: no device
  int multiprocessors = 0;
  int shared_per_block = 0;  // bytes that a launch may ask for (the emulator refuses more)
  int max_cluster = 1;       // largest thread-block cluster that a full-size row kernel can be launched with
};

// The device's own word, asked for once per process; sm is 0 when there is no such device.
const DeviceProperties& device_properties(int device);

}  // namespace fastloss
