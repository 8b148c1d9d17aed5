// The Python module: every function takes addresses and sizes that the wrappers in qnext/ops/cpu have checked.
#include <nanobind/nanobind.h>

#include "bind.h"
#include "isa.h"
#include "pool.h"

namespace nb = nanobind;

NB_MODULE(_native, m) {
  // What is alive when the interpreter ends was not lost: modules are not taken down in the order that would free it.
  nb::set_leak_warnings(false);
  m.doc() = "Native CPU kernels. Arguments are raw addresses: call them through qnext.ops.cpu only.";
  m.def("isa", [] { return qnext::isa_name(qnext::active_isa()); });
  m.def("best_isa", [] { return static_cast<int>(qnext::best_isa()); });
  m.def("force_isa", [](int isa) { qnext::force_isa(static_cast<qnext::Isa>(isa)); });
  m.def("set_num_threads", &qnext::set_num_threads, nb::call_guard<nb::gil_scoped_release>());
  m.def("num_threads", &qnext::num_threads);
  m.def("compute_alone", &qnext::compute_alone);
  qnext::bind_recording(m);
  qnext::bind_row_ops(m);
  qnext::bind_linear(m);
  qnext::bind_delta(m);
  qnext::bind_attention(m);
  qnext::bind_limits(m);
  qnext::bind_residency(m);
  qnext::bind_rounding(m);
  qnext::bind_train(m);
  qnext::bind_train_weights(m);
}
