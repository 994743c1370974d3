// Operators that run packages of compiled passes; see kernels/aot_package.py.
//
// Torch's Python loader holds the GIL for the whole pass. Torch calls operators without the GIL, so
// other threads of a server keep running during a pass.

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/inductor/aoti_torch/utils.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

namespace {

using Loader = torch::inductor::AOTIModelPackageLoader;
using torch::aot_inductor::tensor_handle_to_tensor_pointer;
using torch::aot_inductor::tensor_pointer_to_tensor_handle;
using torch::stable::Tensor;

std::mutex lock;
std::map<int64_t, std::shared_ptr<Loader>> packages;  // open packages by number

int64_t opened(std::string path) {
    auto loader = std::make_shared<Loader>(path);
    const std::lock_guard<std::mutex> held(lock);
    const int64_t number = packages.empty() ? 0 : packages.rbegin()->first + 1;
    packages.emplace(number, std::move(loader));
    return number;
}

// Close a package; a pass that is running is completed.
void closed(int64_t package) {
    std::shared_ptr<Loader> loader;  // destroyed after the lock is released
    const std::lock_guard<std::mutex> held(lock);
    loader = std::move(packages.at(package));
    packages.erase(package);
}

std::shared_ptr<Loader> found(int64_t package) {
    const std::lock_guard<std::mutex> held(lock);
    const auto at = packages.find(package);
    STD_TORCH_CHECK(at != packages.end(), "the package is closed");
    return at->second;
}

Tensor computed(int64_t package, std::vector<Tensor> given) {
    std::vector<at::Tensor> inputs;
    inputs.reserve(given.size());
    for (const Tensor& tensor : given) {
        inputs.push_back(*tensor_handle_to_tensor_pointer(tensor.get()));
    }
    std::vector<at::Tensor> outputs = found(package)->boxed_run(std::move(inputs));
    return Tensor(tensor_pointer_to_tensor_handle(new at::Tensor(std::move(outputs.at(0)))));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(passlm, CompositeExplicitAutograd, library) {
    library.impl("open_package", TORCH_BOX(&opened));
    library.impl("close_package", TORCH_BOX(&closed));
}

STABLE_TORCH_LIBRARY_IMPL(passlm, CPU, library) {
    library.impl("run_package", TORCH_BOX(&computed));
}
