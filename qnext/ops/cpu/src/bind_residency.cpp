#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <string>
#include <tuple>

#include "bind.h"
#include "linear.h"
#include "residency.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace qnext {

namespace {

// As Python hands a layer over: what messages call it, number of its file in the list, offset of its first record,
// checksums of all records.
using Layer = std::tuple<std::string, size_t, int64_t, std::vector<uint32_t>>;

PyObject* record_error = nullptr;  // the class of Python that stands for RecordError

std::unique_ptr<RecordReader> make_reader(const std::string& kind, unsigned depth) {
  if (kind == "io_uring") return make_ring_reader(depth);
  if (kind == "threads") return make_thread_reader(depth);
  throw std::invalid_argument("a reader is io_uring or threads, not " + kind);
}

// Seconds that it takes to read parts of a file one after the other, up to `depth` of them at once.
double time_reads(const std::string& kind, unsigned depth, int file, const std::vector<int64_t>& offsets,
                  int64_t num_bytes, uintptr_t buffers) {
  const auto reader = make_reader(kind, depth);
  const auto begin = std::chrono::steady_clock::now();
  std::vector<uint64_t> free;
  for (unsigned i = 0; i < depth; ++i) free.push_back(i);
  for (size_t next = 0; next < offsets.size() || reader->num_under_way() > 0;) {
    for (; next < offsets.size() && !free.empty(); ++next, free.pop_back())
      reader->begin({free.back(), file, offsets[next], num_bytes, pointer<uint8_t>(buffers) + free.back() * num_bytes});
    Done done[32];
    const size_t count = reader->collect(done, 32, true);
    for (size_t i = 0; i < count; ++i) {
      if (done[i].error != 0) throw std::runtime_error("a read of the probe failed");
      free.push_back(done[i].tag);
    }
  }
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

void translate(const std::exception_ptr& thrown, void*) {
  try {
    std::rethrow_exception(thrown);
  } catch (const RecordError& error) {
    const nb::tuple values = nb::make_tuple(error.layer, error.expert, error.what());
    PyErr_SetObject(record_error ? record_error : PyExc_RuntimeError, values.ptr());
  }
}

nb::dict counts_of(const Residency& residency) {
  const ResidencyCounts& counts = residency.counts();
  nb::dict values;
  values["hits"] = counts.hits.load();
  values["misses"] = counts.misses.load();
  values["sweep_hits"] = counts.sweep_hits.load();
  values["sweep_misses"] = counts.sweep_misses.load();
  values["reads"] = counts.reads.load();
  values["guesses"] = counts.guesses.load();
  values["guesses_used"] = counts.guesses_used.load();
  values["wait_ns"] = counts.wait_ns.load();
  values["sweep_wait_ns"] = counts.sweep_wait_ns.load();
  return values;
}

void bind_layer(nb::module_& m) {
  nb::class_<ResidentLayer>(m, "ResidentLayer", "The experts of one layer, in memory or on disk.")
      .def(
          "use",
          [](ResidentLayer& self, std::vector<int32_t> experts, const std::vector<int32_t>& uses, int64_t num_tokens) {
            const auto count = static_cast<int64_t>(experts.size());
            const int64_t num_hits = self.begin(experts.data(), uses.data(), count, num_tokens);
            for (int64_t come; (come = self.arrived(count)) > 0;) self.finish(come);
            return num_hits;
          },
          "experts"_a, "uses"_a, "num_tokens"_a, nb::call_guard<nb::gil_scoped_release>(),
          "What a kernel does that needs these experts (ascending), without computing. How many were in memory.");
}

}  // namespace

void bind_residency(nb::module_& m) {
  nb::register_exception_translator(translate);
  m.def("raise_as", [](const nb::object& type) { record_error = nb::object(type).release().ptr(); }, "type"_a,
        "The exception for a record that cannot be had, made from layer, expert and message.");
  bind_layer(m);
  nb::class_<Residency>(m, "Residency", "See residency.h. Takes the files, and keeps `owner` of the buffers alive.")
      .def(
          "__init__",
          [](Residency* self, int64_t num_experts, int64_t record_bytes, int64_t half_life,
             int64_t least_wait_ns, const std::vector<int>& files, const std::vector<Layer>& layers, const std::vector<int64_t>& slots,
             uintptr_t buffers, int64_t num_buffers, const std::string& reader, unsigned depth, const nb::object&) {
            std::vector<LayerFile> places;
            for (const auto& [label, file, offset, checksums] : layers)
              places.push_back({label, files.at(file), offset, checksums});
            std::vector<uint8_t*> free;
            for (int64_t i = num_buffers; i-- > 0;) free.push_back(pointer<uint8_t>(buffers + i * record_bytes));
            new (self) Residency({num_experts, record_bytes, half_life, least_wait_ns}, files, std::move(places), slots,
                                 std::move(free), make_reader(reader, depth));
          },
          nb::kw_only(), "num_experts"_a, "record_bytes"_a, "half_life"_a, "least_wait_ns"_a, "files"_a, "layers"_a, "slots"_a,
          "buffers"_a, "num_buffers"_a, "reader"_a, "depth"_a, "owner"_a, nb::keep_alive<1, 13>())
      .def("layer", &Residency::layer, "number"_a, nb::rv_policy::reference_internal)
      .def("counts", &counts_of)
      .def("residents", &Residency::residents, "layer"_a)
      .def("others", &Residency::others, "layer"_a)
      .def("fill", &Residency::fill, "layer"_a, "experts"_a, nb::call_guard<nb::gil_scoped_release>())
      .def("look_ahead", &Residency::look_ahead, "layer"_a, "router"_a)
      .def("clear", &Residency::clear, nb::call_guard<nb::gil_scoped_release>())
      .def(
          "read",
          [](const Residency& self, int64_t layer, int64_t expert, uintptr_t to) {
            self.read(layer, expert, pointer<uint8_t>(to));
          },
          "layer"_a, "expert"_a, "to"_a, nb::call_guard<nb::gil_scoped_release>());
  m.def("time_reads", &time_reads, "reader"_a, "depth"_a, "file"_a, "offsets"_a, "num_bytes"_a, "buffers"_a,
        nb::call_guard<nb::gil_scoped_release>());
  m.def(
      "crc32",
      [](uintptr_t bytes, int64_t count) { return crc32(pointer<const uint8_t>(bytes), count); },
      nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace qnext
