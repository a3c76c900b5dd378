// SPDX-License-Identifier: MIT

// The linear head with the losses that its tests share. Also linked into the [threads] tests.

#include "support/linear_run.hpp"

#include <memory>
#include <utility>

namespace perdita_tests {
namespace {

template <class Loss>
class linear_subject_of final : public linear_subject<typename Loss::value_type> {
public:
  using T = typename Loss::value_type;
  explicit linear_subject_of(Loss loss) : loss_(std::move(loss)) {}
  bool has_softmax() const override { return Loss::has_softmax; }

  T operator()(const linear_call<T>& call) const override {
    if (!call.bias.data)
      return with_weights(call, call.weights);
    const perdita::affine weights(call.weights, call.bias);
    return with_weights(call, weights);
  }

private:
  template <class W> T with_weights(const linear_call<T>& call, const W& weights) const {
    if constexpr (Loss::takes_soft_targets)
      if (call.sparse)
        return with_target(call, weights, *call.sparse);
    return with_target(call, weights, call.labels);
  }
  template <class W, class Y>
  T with_target(const linear_call<T>& call, const W& weights, const Y& target) const {
    const perdita::linear head(loss_, call.head);
    if (!call.wants_gradient)
      return head(call.hidden, weights, target, call.options);
    if (!call.d_bias.data)
      return head(call.hidden, weights, target, call.d_hidden, call.d_weights, call.options);
    const perdita::affine d_weights(call.d_weights, call.d_bias);
    return head(call.hidden, weights, target, call.d_hidden, d_weights, call.options);
  }
  Loss loss_;
};

template <class Loss> auto make(const Loss& loss) {
  return std::make_unique<linear_subject_of<Loss>>(loss);
}

} // namespace

linear_subject_pointer<float> make_linear(const perdita::cross_entropy<float>& l) {
  return make(l);
}
linear_subject_pointer<double> make_linear(const perdita::cross_entropy<double>& l) {
  return make(l);
}
linear_subject_pointer<float> make_linear(const perdita::ldr_kl<float>& l) { return make(l); }
linear_subject_pointer<double> make_linear(const perdita::ldr_kl<double>& l) { return make(l); }
linear_subject_pointer<float> make_linear(const perdita::z_loss<float>& l) { return make(l); }
linear_subject_pointer<double> make_linear(const perdita::z_loss<double>& l) { return make(l); }

} // namespace perdita_tests
