/* The reckoning of `offload.ledger`: what stands in its log, line by line, as `offload.books.Books` does it. A step
 * writes two lines for each save. Nothing here runs Python, so no interrupt and no collector comes between.
 */

#include "_fast.h"

static PyObject *name_added_bytes, *name_num_by_stage, *name_kept_bytes, *name_key, *name_num_bytes, *name_popleft,
    *name_row, *name_storage_bytes, *stage_parameter, *stage_reference;

/* Return an int attribute, or what a method without arguments returns, as a number; -1 with an error set. */
Py_ssize_t number_of(PyObject *owner, PyObject *name, int is_method)
{
    PyObject *number = is_method ? PyObject_CallMethodNoArgs(owner, name) : PyObject_GetAttr(owner, name);
    if (number == NULL)
        return -1;
    Py_ssize_t value = PyLong_AsSsize_t(number);
    Py_DECREF(number);
    return value;
}

/* ---- Claim ---- */

static void claim_dealloc(Claim *self)
{
    Py_XDECREF(self->row);
    PyObject_Free(self);
}

static PyMemberDef claim_members[] = {
    {"key", T_PYSSIZET, offsetof(Claim, key), READONLY, "identity of the storage"},
    {"num_bytes", T_PYSSIZET, offsetof(Claim, num_bytes), READONLY, "bytes of the storage"},
    {"added_bytes", T_PYSSIZET, offsetof(Claim, added_bytes), 0, "bytes that came to be held, once booked"},
    {"row", T_OBJECT, offsetof(Claim, row), READONLY, "where the save is counted"},
    {NULL},
};

PyTypeObject ClaimType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "offload._fast.Claim",
    .tp_doc = "That a storage is held.",
    .tp_basicsize = sizeof(Claim),
    .tp_dealloc = (destructor)claim_dealloc,
    .tp_members = claim_members,
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
};

/* ---- Books ---- */

/* What has holders. */
typedef struct {
    PyObject_HEAD
    Py_ssize_t num_bytes, num_holders, step;
} Held;

static PyTypeObject HeldType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "offload._fast.Held",
    .tp_doc = "What has holders.",
    .tp_basicsize = sizeof(Held),
    .tp_dealloc = (destructor)PyObject_Free,
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
};

typedef struct {
    PyObject_HEAD
    PyObject *log;      /* of the ledger: a claim in a tuple begins, a claim alone ends, and a row is a parameter's */
    PyObject *living;   /* {identity: claim} of Python's claims: nobody else may have them */
    PyObject *held;     /* {key: Held} */
    PyTypeObject *row;
    Py_ssize_t step, held_bytes, peak_bytes, storage_bytes;
} Books;

static int books_traverse(Books *self, visitproc visit, void *arg)
{
    Py_VISIT(self->log);
    Py_VISIT(self->living);
    Py_VISIT(self->held);
    Py_VISIT(self->row);
    return 0;
}

static int books_clear(Books *self)
{
    Py_CLEAR(self->log);
    Py_CLEAR(self->living);
    Py_CLEAR(self->held);
    Py_CLEAR(self->row);
    return 0;
}

static void books_dealloc(Books *self)
{
    PyObject_GC_UnTrack(self);
    books_clear(self);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static int books_init(Books *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"log", "row", NULL};
    PyObject *log, *row;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O$O!", names, &log, &PyType_Type, &row))
        return -1;
    books_clear(self);
    self->log = Py_NewRef(log);
    self->row = (PyTypeObject *)Py_NewRef(row);
    self->living = PyDict_New();
    self->held = PyDict_New();
    return self->living == NULL || self->held == NULL ? -1 : 0;
}

/* Add to a number among the attributes of an object; 0, or -1 and an error. */
static int add_to(PyObject *owner, PyObject *name, Py_ssize_t more)
{
    Py_ssize_t value = number_of(owner, name, 0);
    if (value < 0 && PyErr_Occurred())
        return -1;
    PyObject *sum = PyLong_FromSsize_t(value + more);
    int failed = sum == NULL || PyObject_SetAttr(owner, name, sum) < 0;
    Py_XDECREF(sum);
    return failed ? -1 : 0;
}

/* As Row.count. */
static int count(PyObject *row, PyObject *stage, Py_ssize_t kept_bytes)
{
    PyObject *by_stage = PyObject_GetAttr(row, name_num_by_stage), *more = NULL;
    if (by_stage == NULL)
        return -1;
    PyObject *num = PyDict_GetItemWithError(by_stage, stage);
    if (!PyErr_Occurred())
        more = PyLong_FromSsize_t(1 + (num == NULL ? 0 : PyLong_AsSsize_t(num)));
    int failed = more == NULL || PyDict_SetItem(by_stage, stage, more) < 0;
    Py_XDECREF(more);
    Py_DECREF(by_stage);
    return failed ? -1 : kept_bytes == 0 ? 0 : add_to(row, name_kept_bytes, kept_bytes);
}

/* Note that a claim of Python's lives; 1, 0 where that was known, or -1 and an error. */
static int begin_living(Books *self, PyObject *claim)
{
    PyObject *identity = PyLong_FromVoidPtr(claim);
    int is_known = identity == NULL ? -1 : PyDict_Contains(self->living, identity);
    int failed = is_known < 0 || (!is_known && PyDict_SetItem(self->living, identity, claim) < 0);
    Py_XDECREF(identity);
    return failed ? -1 : !is_known;
}

/* Return what is held under `key`, borrowed, at first nothing; NULL and an error. */
static Held *find_held(Books *self, Py_ssize_t key)
{
    PyObject *number = PyLong_FromSsize_t(key);
    Held *held = number == NULL ? NULL : (Held *)PyDict_GetItemWithError(self->held, number);
    if (held == NULL && !PyErr_Occurred()) {
        held = PyObject_New(Held, &HeldType);
        if (held != NULL) {
            held->num_bytes = held->num_holders = 0;
            held->step = -1;
            int failed = PyDict_SetItem(self->held, number, (PyObject *)held) < 0;
            Py_DECREF(held);
            if (failed)
                held = NULL;
        }
    }
    Py_XDECREF(number);
    return held;
}

/* Count one more holder, of what may have grown since the last; return what came to be held, or -1 and an error. */
static Py_ssize_t begin(Books *self, Py_ssize_t key, Py_ssize_t num_bytes, Py_ssize_t storage_bytes)
{
    Held *held = find_held(self, key);
    if (held == NULL)
        return -1;
    Py_ssize_t added_bytes = num_bytes > held->num_bytes ? num_bytes - held->num_bytes : 0;
    held->num_bytes += added_bytes;
    held->num_holders++;
    self->held_bytes += added_bytes;
    if (self->held_bytes > self->peak_bytes)
        self->peak_bytes = self->held_bytes;
    if (held->step != self->step) {
        held->step = self->step;
        self->storage_bytes += storage_bytes;
    }
    return added_bytes;
}

static int begin_claim(Books *self, Claim *claim)
{
    if (claim->is_booked)
        return 0;
    claim->is_booked = 1;
    claim->added_bytes = begin(self, claim->key, claim->num_bytes, claim->num_bytes);
    if (claim->added_bytes < 0)
        return -1;
    return claim->row == NULL ? 0 : count(claim->row, stage_reference, claim->added_bytes);
}

/* The same of a claim of Python's. */
static int begin_theirs(Books *self, PyObject *claim)
{
    int is_new = begin_living(self, claim);
    if (is_new <= 0)
        return is_new;
    Py_ssize_t key = number_of(claim, name_key, 0), num_bytes = number_of(claim, name_num_bytes, 0);
    Py_ssize_t storage_bytes = number_of(claim, name_storage_bytes, 0);
    if (PyErr_Occurred())
        return -1;
    Py_ssize_t added_bytes = begin(self, key, num_bytes, storage_bytes);
    if (added_bytes < 0 || (added_bytes > 0 && add_to(claim, name_added_bytes, added_bytes) < 0))
        return -1;
    PyObject *row = PyObject_GetAttr(claim, name_row);
    int failed = row == NULL || (row != Py_None && count(row, stage_reference, added_bytes) < 0);
    Py_XDECREF(row);
    return failed ? -1 : 0;
}

/* Reckon that one holder of `key` has ended; 0, or -1 and an error. */
static int end(Books *self, Py_ssize_t key)
{
    PyObject *number = PyLong_FromSsize_t(key);
    Held *held = number == NULL ? NULL : (Held *)PyDict_GetItemWithError(self->held, number);
    int failed = held == NULL && PyErr_Occurred();
    if (held != NULL && --held->num_holders == 0) {
        self->held_bytes -= held->num_bytes;
        failed = PyDict_DelItem(self->held, number) < 0;
    }
    Py_XDECREF(number);
    return failed ? -1 : 0;
}

static int end_claim(Books *self, Claim *claim)
{
    if (!claim->is_booked)
        return 0;
    claim->is_booked = 0;
    return end(self, claim->key);
}

/* The same of a claim of Python's: some end twice. */
static int end_theirs(Books *self, PyObject *claim)
{
    PyObject *identity = PyLong_FromVoidPtr(claim);
    int is_known = identity == NULL ? -1 : PyDict_Contains(self->living, identity);
    int failed = is_known < 0 || (is_known && PyDict_DelItem(self->living, identity) < 0);
    Py_XDECREF(identity);
    if (failed || !is_known)
        return failed ? -1 : 0;
    Py_ssize_t key = number_of(claim, name_key, 0);
    return PyErr_Occurred() ? -1 : end(self, key);
}

static int book_line(Books *self, PyObject *line)
{
    if (PyObject_TypeCheck(line, self->row))
        return count(line, stage_parameter, 0);
    if (!PyTuple_CheckExact(line))
        return Py_TYPE(line) == &ClaimType ? end_claim(self, (Claim *)line) : end_theirs(self, line);
    PyObject *claim = PyTuple_GET_ITEM(line, 0);
    return Py_TYPE(claim) == &ClaimType ? begin_claim(self, (Claim *)claim) : begin_theirs(self, claim);
}

static PyObject *books_book(Books *self, PyObject *unused)
{
    Py_ssize_t num_lines;
    while ((num_lines = PyObject_Size(self->log)) > 0) {
        PyObject *line = PyObject_CallMethodNoArgs(self->log, name_popleft);
        int failed = line == NULL || book_line(self, line) < 0;
        Py_XDECREF(line);
        if (failed)
            return NULL;
    }
    return num_lines < 0 ? NULL : Py_NewRef(Py_None);
}

static PyObject *books_begin_step(Books *self, PyObject *unused)
{
    PyObject *none = books_book(self, NULL);
    if (none != NULL) {
        self->peak_bytes = self->held_bytes;
        self->storage_bytes = 0;
        self->step++;
    }
    return none;
}

static PyMethodDef books_methods[] = {
    {"book", (PyCFunction)books_book, METH_NOARGS, "Reckon what stands in the log."},
    {"begin_step", (PyCFunction)books_begin_step, METH_NOARGS, "Start a new peak, and count storages anew."},
    {NULL},
};

static PyMemberDef books_members[] = {
    {"living", T_OBJECT, offsetof(Books, living), READONLY, "claims of Python's by identity"},
    {"held", T_OBJECT, offsetof(Books, held), READONLY, "what is held by key"},
    {"held_bytes", T_PYSSIZET, offsetof(Books, held_bytes), READONLY, "held now"},
    {"peak_bytes", T_PYSSIZET, offsetof(Books, peak_bytes), READONLY, "the most held since the step began"},
    {"storage_bytes", T_PYSSIZET, offsetof(Books, storage_bytes), READONLY, "of the storages of the step"},
    {NULL},
};

PyTypeObject BooksType = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "offload._fast.Books",
    .tp_doc = "What a ledger's log comes to.",
    .tp_basicsize = sizeof(Books),
    .tp_new = PyType_GenericNew,
    .tp_init = (initproc)books_init,
    .tp_dealloc = (destructor)books_dealloc,
    .tp_traverse = (traverseproc)books_traverse,
    .tp_clear = (inquiry)books_clear,
    .tp_methods = books_methods,
    .tp_members = books_members,
    .tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
};

int ready_books(void)
{
    name_added_bytes = PyUnicode_InternFromString("added_bytes");
    name_kept_bytes = PyUnicode_InternFromString("kept_bytes");
    name_key = PyUnicode_InternFromString("key");
    name_num_bytes = PyUnicode_InternFromString("num_bytes");
    name_num_by_stage = PyUnicode_InternFromString("num_by_stage");
    name_popleft = PyUnicode_InternFromString("popleft");
    name_row = PyUnicode_InternFromString("row");
    name_storage_bytes = PyUnicode_InternFromString("storage_bytes");
    stage_parameter = PyUnicode_InternFromString("parameter");
    stage_reference = PyUnicode_InternFromString("reference");
    if (PyErr_Occurred())
        return -1;
    return PyType_Ready(&ClaimType) < 0 || PyType_Ready(&HeldType) < 0 || PyType_Ready(&BooksType) < 0 ? -1 : 0;
}
