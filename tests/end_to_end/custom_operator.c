/* A library with one custom operator, acme.ops:Twice(x) = 2 x for float tensors.

   ONNX Runtime's C headers are not in its Python package. Its tables of functions only ever grow at
   the end (onnxruntime_c_api.cc asserts the offsets), so the few that are needed have numbers here. */
#include <stddef.h>
#include <stdint.h>

typedef void *(*Function)();
typedef struct { const Function *(*GetApi)(uint32_t version); } ApiBase;
enum {
    CreateCustomOpDomain = 26, CustomOpDomain_Add = 27, AddCustomOpDomain = 28,
    GetTensorMutableData = 51, GetDimensionsCount = 61, GetDimensions = 62,
    GetTensorShapeElementCount = 64, GetTensorTypeAndShape = 65,
    KernelContext_GetInput = 90, KernelContext_GetOutput = 91, ReleaseTensorTypeAndShapeInfo = 99
};
static const Function *api;

static void *create(const void *op, const void *ort, const void *info) { return (void *)op; }
static const char *name(const void *op) { return "Twice"; }
static const char *provider(const void *op) { return NULL; }
static int type(const void *op, size_t index) { return 1; /* float */ }
static size_t one(const void *op) { return 1; }
static int required(const void *op, size_t index) { return 0; }
static void destroy(void *kernel) {}

static void compute(void *kernel, void *context)
{
    void *input, *output, *shape;
    int64_t dims[16];
    size_t rank, count;
    float *x, *y;
    api[KernelContext_GetInput](context, (size_t)0, &input);
    api[GetTensorTypeAndShape](input, &shape);
    api[GetDimensionsCount](shape, &rank);
    api[GetDimensions](shape, dims, rank);
    api[GetTensorShapeElementCount](shape, &count);
    api[ReleaseTensorTypeAndShapeInfo](shape);
    api[KernelContext_GetOutput](context, (size_t)0, dims, rank, &output);
    api[GetTensorMutableData](input, &x);
    api[GetTensorMutableData](output, &y);
    for (size_t i = 0; i < count; i++)
        y[i] = 2 * x[i];
}

static const struct {
    uint32_t version;
    void *(*create)(const void *, const void *, const void *);
    const char *(*name)(const void *);
    const char *(*provider)(const void *);
    int (*input_type)(const void *, size_t);
    size_t (*inputs)(const void *);
    int (*output_type)(const void *, size_t);
    size_t (*outputs)(const void *);
    void (*compute)(void *, void *);
    void (*destroy)(void *);
    int (*input_use)(const void *, size_t);
    int (*output_use)(const void *, size_t);
    int (*input_memory)(const void *, size_t);
    void *later[16]; /* fields of later versions: not there */
} operator_ = {8, create, name, provider, type, one, type, one, compute, destroy,
               required, required, required};

void *RegisterCustomOps(void *options, const ApiBase *base)
{
    void *domain;
    api = base->GetApi(1);
    api[CreateCustomOpDomain]("acme.ops", &domain);
    api[CustomOpDomain_Add](domain, &operator_);
    return api[AddCustomOpDomain](options, domain);
}
