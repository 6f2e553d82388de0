// Calls cublasLt, found at run time, through the few declarations needed. See matmul.hpp.
#include "matmul.hpp"

#include <dlfcn.h>

#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "checks.hpp"

namespace nla {
namespace {

// The needed part of cublasLt.h, the same in CUDA 12 and 13. The header itself comes with neither a C++ compiler nor
// nvcc's own packages, and builds without it choose algorithms too. tests/ops/test_linear.py compares this with it.
using Status = int;
struct Algorithm {
    uint64_t data[8];
};
struct Heuristic {
    Algorithm algorithm;
    size_t workspace;
    Status state;
    float waves;
    int reserved[4];
};
constexpr int kFloat32 = 0, kBfloat16 = 14;                                           // cudaDataType
constexpr int kComputeFloat32 = 68;                                                   // cublasComputeType_t
constexpr int32_t kTranspose = 1;                                                     // cublasOperation_t
constexpr int kDescTransA = 3, kDescEpilogue = 7, kDescBiasPointer = 8;               // cublasLtMatmulDescAttributes_t
constexpr int32_t kEpilogueBias = 4;                                                  // cublasLtEpilogue_t
constexpr int kPreferWorkspaceBytes = 1;                                              // cublasLtMatmulPreference...
constexpr int kMostAlgorithms = 32;
constexpr uintptr_t kAlignment = 256;  // what cublasLt assumes of pointers unless told otherwise

struct Library {
    Status (*create)(void** handle);
    Status (*desc_create)(void** desc, int compute, int scale);
    Status (*desc_set)(void* desc, int attribute, const void* value, size_t bytes);
    Status (*desc_destroy)(void* desc);
    Status (*layout_create)(void** layout, int type, uint64_t rows, uint64_t columns, int64_t stride);
    Status (*layout_destroy)(void* layout);
    Status (*prefer_create)(void** preference);
    Status (*prefer_set)(void* preference, int attribute, const void* value, size_t bytes);
    Status (*prefer_destroy)(void* preference);
    Status (*heuristic)(void* handle, void* desc, void* a, void* b, void* c, void* d, void* preference, int most,
                        Heuristic* found, int* count);
    Status (*matmul)(void* handle, void* desc, const void* alpha, const void* a, void* a_layout, const void* b,
                     void* b_layout, const void* beta, const void* c, void* c_layout, void* d, void* d_layout,
                     const Algorithm* algorithm, void* workspace, size_t workspace_bytes, void* stream);
};

template <typename F>
bool find(void* opened, const char* name, F& function) {
    function = reinterpret_cast<F>(dlsym(opened, name));
    return function != nullptr;
}

bool load(Library& to) {
    for (const char* name : {"libcublasLt.so.13", "libcublasLt.so.12"}) {
        void* opened = dlopen(name, RTLD_NOW | RTLD_NOLOAD);
        if (opened != nullptr) {
            return find(opened, "cublasLtCreate", to.create) &&
                   find(opened, "cublasLtMatmulDescCreate", to.desc_create) &&
                   find(opened, "cublasLtMatmulDescSetAttribute", to.desc_set) &&
                   find(opened, "cublasLtMatmulDescDestroy", to.desc_destroy) &&
                   find(opened, "cublasLtMatrixLayoutCreate", to.layout_create) &&
                   find(opened, "cublasLtMatrixLayoutDestroy", to.layout_destroy) &&
                   find(opened, "cublasLtMatmulPreferenceCreate", to.prefer_create) &&
                   find(opened, "cublasLtMatmulPreferenceSetAttribute", to.prefer_set) &&
                   find(opened, "cublasLtMatmulPreferenceDestroy", to.prefer_destroy) &&
                   find(opened, "cublasLtMatmulAlgoGetHeuristic", to.heuristic) &&
                   find(opened, "cublasLtMatmul", to.matmul);
        }
    }
    return false;
}

// Null until the process has loaded the library. Called under the GIL, like everything here.
const Library* library() {
    static Library found;
    static bool loaded = false;
    loaded = loaded || load(found);
    return loaded ? &found : nullptr;
}

void must(Status status, const char* call) {
    if (status != 0) throw std::runtime_error(std::string(call) + " gave cuBLAS status " + std::to_string(status));
}

// One handle per device, kept until the process ends.
void* handle_of(const Library& lib, int device) {
    static std::map<int, void*> handles;
    void*& handle = handles[device];
    if (handle == nullptr) must(lib.create(&handle), "cublasLtCreate");
    return handle;
}

}  // namespace

struct Matmul::Plan {
    const Library* lib = nullptr;
    MatmulShape shape{};
    size_t workspace_bytes = 0;
    void *handle = nullptr, *desc = nullptr, *w = nullptr, *x = nullptr, *out = nullptr;
    std::vector<Heuristic> algorithms;

    ~Plan() {
        for (void* layout : {w, x, out}) {
            if (layout != nullptr) lib->layout_destroy(layout);
        }
        if (desc != nullptr) lib->desc_destroy(desc);
    }

    void set(int attribute, const void* value, size_t bytes) const {
        must(lib->desc_set(desc, attribute, value, bytes), "cublasLtMatmulDescSetAttribute");
    }

    void set_bias(const void* bias) const { set(kDescBiasPointer, &bias, sizeof bias); }
};

bool matmul_available() { return library() != nullptr; }

Matmul::Matmul(int device, const MatmulShape& shape, size_t workspace_bytes) : plan_(std::make_unique<Plan>()) {
    check_positive(shape.m, "m");
    check_positive(shape.n, "n");
    check_positive(shape.k, "k");
    Plan& plan = *plan_;
    plan.lib = library();
    if (plan.lib == nullptr) throw std::runtime_error("no cublasLt of version 12 or 13 is loaded");
    const Library& lib = *plan.lib;
    plan.shape = shape;
    plan.workspace_bytes = workspace_bytes;
    plan.handle = handle_of(lib, device);
    // cublasLt is column-major: out^T [n, m] = (w^T)^T x^T, every matrix as its rows are in memory.
    must(lib.desc_create(&plan.desc, kComputeFloat32, kFloat32), "cublasLtMatmulDescCreate");
    plan.set(kDescTransA, &kTranspose, sizeof kTranspose);
    if (shape.bias) {
        plan.set(kDescEpilogue, &kEpilogueBias, sizeof kEpilogueBias);
        plan.set_bias(reinterpret_cast<const void*>(kAlignment));  // the heuristic only reads its alignment
    }
    must(lib.layout_create(&plan.w, kBfloat16, shape.k, shape.n, shape.k), "cublasLtMatrixLayoutCreate");
    must(lib.layout_create(&plan.x, kBfloat16, shape.k, shape.m, shape.k), "cublasLtMatrixLayoutCreate");
    must(lib.layout_create(&plan.out, kBfloat16, shape.n, shape.m, shape.n), "cublasLtMatrixLayoutCreate");

    void* created = nullptr;
    must(lib.prefer_create(&created), "cublasLtMatmulPreferenceCreate");
    const std::unique_ptr<void, Status (*)(void*)> preference(created, lib.prefer_destroy);
    must(lib.prefer_set(created, kPreferWorkspaceBytes, &workspace_bytes, sizeof workspace_bytes),
         "cublasLtMatmulPreferenceSetAttribute");
    plan.algorithms.resize(kMostAlgorithms);
    int count = 0;
    const Status status = lib.heuristic(plan.handle, plan.desc, plan.w, plan.x, plan.out, plan.out, created,
                                        kMostAlgorithms, plan.algorithms.data(), &count);
    plan.algorithms.resize(status == 0 ? count : 0);
}

Matmul::~Matmul() = default;

int Matmul::algorithms() const { return static_cast<int>(plan_->algorithms.size()); }

void Matmul::run(int algorithm, uintptr_t stream, const void* x, const void* w, const void* bias, void* out,
                 void* workspace) const {
    const Plan& plan = *plan_;
    check(algorithm >= 0 && algorithm < algorithms(), "algorithm",
          std::to_string(algorithm) + " is not one of " + std::to_string(algorithms()));
    check((bias != nullptr) == plan.shape.bias, "bias", "is given or missing, unlike in the plan");
    for (const void* pointer : {x, w, static_cast<const void*>(out), static_cast<const void*>(workspace)}) {
        check_pointer(pointer, "x, w, out or workspace");
        check(is_aligned(pointer, kAlignment), "x, w, out or workspace", "is not a multiple of 256 bytes");
    }
    if (plan.shape.bias) {
        check(is_aligned(bias, kAlignment), "bias", "is not a multiple of 256 bytes");
        plan.set_bias(bias);
    }
    const float one = 1.0f, kept = plan.shape.accumulate ? 1.0f : 0.0f;
    must(plan.lib->matmul(plan.handle, plan.desc, &one, w, plan.w, x, plan.x, &kept, out, plan.out, out, plan.out,
                          &plan.algorithms[algorithm].algorithm, workspace, plan.workspace_bytes,
                          reinterpret_cast<void*>(stream)),
         "cublasLtMatmul");
}

}  // namespace nla
