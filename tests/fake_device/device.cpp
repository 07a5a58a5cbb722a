// A GPU that is none, for a torch that was built for processors: tensors have its device (DEVICE is CUDA or MPS) and no
// memory, streams and events do nothing. Autograd's engine asks for it; torch's FakeTensorMode does the rest.
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/detail/MPSHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#define JOINED(a, b) a##b
#define OF(device, name) JOINED(device, name)
#define REGISTER(registry, name) C10_REGISTER_CLASS(registry, name, name)  // which makes a text of the name

namespace {
using namespace c10;

const Device device{DeviceType::DEVICE, 0};

struct Guard : impl::NoOpDeviceGuardImpl<DeviceType::DEVICE> {
  Device exchangeDevice(Device) const override { return device; }
  Device getDevice() const override { return device; }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, device); }
  Stream exchangeStream(Stream) const noexcept override { return Stream(Stream::DEFAULT, device); }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};
C10_REGISTER_GUARD_IMPL(DEVICE, Guard)

struct OF(DEVICE, Hooks) : at::OF(DEVICE, HooksInterface) {  // the registry knows it by this name
  template <class... Nothing>
  OF(DEVICE, Hooks)(Nothing...) {}
  void init() const override {}
  bool OF(has, DEVICE)() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
};
using at::OF(DEVICE, HooksRegistry);
using at::OF(OF(Registerer, DEVICE), HooksRegistry);
REGISTER(OF(DEVICE, HooksRegistry), OF(DEVICE, Hooks))
}  // namespace
