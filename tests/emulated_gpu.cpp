// A CUDA device for PyTorch's CPU build: its memory is the host's and its operators are those of the CPU, which refuse
// tensors that lie elsewhere as a GPU's do. Fresh memory holds NaN.

#include <cstdlib>
#include <cstring>

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_local_scalar_dense.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::Stream;
using c10::SymIntArrayRef;
using std::optional;

constexpr auto CUDA = c10::DeviceType::CUDA;
constexpr c10::DispatchKeySet KEYS(c10::DispatchKey::CUDA);

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = bytes == 0 ? nullptr : std::malloc(bytes);
    if (data != nullptr) std::memset(data, 0xff, bytes);
    return {data, data, &std::free, Device(CUDA, 0)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
} memory;
REGISTER_ALLOCATOR(CUDA, &memory);

// All is done when a call returns: streams and events have nothing to do.
struct Guard final : c10::impl::NoOpDeviceGuardImpl<CUDA> {
  Device getDevice() const override { return {CUDA, 0}; }
  Stream getStream(Device device) const noexcept override { return Stream(Stream::DEFAULT, device); }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  void init() const override {}
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  at::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
};

at::Tensor empty(SymIntArrayRef size, optional<at::ScalarType> dtype, optional<at::Layout>, optional<Device>,
                 optional<bool>, optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &memory, KEYS, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(SymIntArrayRef size, SymIntArrayRef stride, optional<at::ScalarType> dtype,
                         optional<at::Layout>, optional<Device>, optional<bool>) {
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &memory,
                                           KEYS, c10::dtype_or_default(dtype));
}

at::Tensor on_host(const at::Tensor& x) {
  if (x.device().is_cpu()) return x;
  void* data = x.numel() == 0 ? nullptr : x.data_ptr();
  auto host = at::from_blob(data, x.sizes(), x.strides(), x.options().device(at::kCPU));
  host._set_conj(x.is_conj());
  host._set_neg(x.is_neg());
  return host;
}

at::Tensor& copy_(at::Tensor& to, const at::Tensor& from, bool) {
  c10::impl::ExcludeDispatchKeyGuard no_autograd(c10::autograd_dispatch_keyset);
  on_host(to).copy_(on_host(from));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  at::Tensor result = to;
  result.resize_(from.sizes());
  return copy_(result, from, false);
}

at::Scalar local_scalar_dense(const at::Tensor& x) { return at::_local_scalar_dense(on_host(x)); }

const at::Tensor& resize_(const at::Tensor& x, SymIntArrayRef size, optional<at::MemoryFormat> format) {
  return at::native::resize_(x, C10_AS_INTARRAYREF_SLOW(size), format);
}

at::Tensor view(const at::Tensor& x, SymIntArrayRef size) { return at::native::view(x, C10_AS_INTARRAYREF_SLOW(size)); }

at::Tensor reshape_alias(const at::Tensor& x, SymIntArrayRef size, SymIntArrayRef stride) {
  return at::native::_reshape_alias(x, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

at::Tensor as_strided(const at::Tensor& x, SymIntArrayRef size, SymIntArrayRef stride, optional<c10::SymInt> offset) {
  const auto begin = offset ? optional<int64_t>(offset->guard_int(__FILE__, __LINE__)) : std::nullopt;
  return at::native::as_strided_tensorimpl(x, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), begin);
}

// Which of the fused kernels is to serve: none.
int64_t fused_sdp_choice(const at::Tensor&, const at::Tensor&, const at::Tensor&, const optional<at::Tensor>&, double,
                         bool, optional<double>, bool) {
  return 0;
}

void on_the_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto check = [&](const at::Tensor& x) {
    const bool scalar = x.defined() && x.device().is_cpu() && x.dim() == 0;  // may lie on the host, as for a GPU
    TORCH_CHECK(!x.defined() || x.is_cuda() || scalar, schema.name(), " got a tensor on ", x.device(), " beside others",
                " on the GPU");
  };
  const auto arguments = torch::jit::last(stack, schema.arguments().size());
  for (const auto& value : arguments) {  // optional tensors in lists are indices, which may lie on the host
    if (value.isTensor()) check(value.toTensor());
    if (value.isTensorList())
      for (const at::Tensor& x : value.toTensorVector()) check(x);
  }
  at::native::cpu_fallback(op, stack);
}

}  // namespace

namespace at {
using Hooks = ::Hooks;
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, Hooks)
}  // namespace at

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_the_cpu>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("copy_", copy_);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar_dense);
  m.impl("resize_", resize_);
  m.impl("view", view);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("as_strided", as_strided);
  m.impl("view_as_real", at::native::view_as_real);
  m.impl("view_as_complex", at::native::view_as_complex);
  m.impl("set_.source_Storage", at::native::set_);
  m.impl("set_.source_Storage_storage_offset", at::native::set_storage_cpu_);
  m.impl("_fused_sdp_choice", fused_sdp_choice);
  // PyTorch would choose among the convolutions of GPUs.
  m.impl("convolution", torch::CppFunction::makeFromBoxedFunction<&on_the_cpu>());
  m.impl("convolution_backward", torch::CppFunction::makeFromBoxedFunction<&on_the_cpu>());
}
