#include <mutex>

#include "primitives.cuh"

namespace fastloss {

const DeviceProperties& device_properties(int device) {
  constexpr int kDevices = 64;
  static std::once_flag once[kDevices];
  static DeviceProperties known[kDevices + 1];
  if (device < 0 || device >= kDevices) return known[kDevices];
  std::call_once(once[device], [device] { known[device] = query_device(device); });
  return known[device];
}

}  // namespace fastloss
