#include "bind.h"
#include "recording.h"

namespace nb = nanobind;

namespace qnext {

void bind_recording(nb::module_& m) {
  nb::class_<Recording>(m, "Recording", "Calls of this module, to be made again; whoever records keeps their memory alive.")
      .def(nb::init<>())
      .def("start", &Recording::start)
      .def("stop", &Recording::stop)
      .def("replay", &Recording::replay, nb::call_guard<nb::gil_scoped_release>())
      .def("__len__", &Recording::size);
}

}  // namespace qnext
