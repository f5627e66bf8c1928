/* exec/session_index.c: binding by name or index, and running by index: a caller that keeps its
   pointers in the order of rg_plan_tensor makes one call a direction, and no name is looked up.

   What a direction takes: the forward inputs and outputs, the backward gradients. The others stay
   as they are bound, so one array serves both.
 */
#include "session.h"

static bool takes(rg_direction direction, rg_role role) {
  return (direction == RG_BACKWARD) != rgi_role_forward(role);
}

static rg_status check_pointer(const rg_tensor_info *t, const void *ptr, rg_error *e) {
  if ((uintptr_t)ptr % (size_t)t->alignment == 0) return RG_OK;
  return rgi_fail(e, RG_E_USAGE, NULL, NULL,
                  "the %s \"%s\" is bound to %p; expected a multiple of %d", rgi_role_name(t->role),
                  t->name, ptr, t->alignment);
}

rg_status rg_session_bind_index(rg_session *s, size_t i, void *ptr, size_t bytes, rg_error *e) {
  if (!s) return rgi_fail(e, RG_E_USAGE, NULL, NULL, "the session is NULL");
  if (i >= (size_t)s->plan->nbindable)
    return rgi_fail(e, RG_E_USAGE, NULL, NULL, "there is no tensor %zu; the plan has %d", i,
                    s->plan->nbindable);
  const rg_tensor_info *t = &s->plan->bindable[i].info;
  if (ptr && bytes != (size_t)t->bytes)
    return rgi_fail(e, RG_E_USAGE, NULL, NULL, "%zu bytes bound to the %s \"%s\"; expected %lld",
                    bytes, rgi_role_name(t->role), t->name, (long long)t->bytes);
  RGI_TRY(check_pointer(t, ptr, e));
  s->bound[i] = ptr;
  return RG_OK;
}

/* There is no such name: say which there are of this role. */
static rg_status unknown_name(const rg_plan *plan, rg_role role, const char *name, rg_error *e) {
  const char *near = NULL, *names[64];
  int n = 0;
  for (int32_t i = 0; i < plan->nbindable && n < RGI_COUNT(names); i++)
    if (plan->bindable[i].info.role == role) names[n++] = plan->bindable[i].info.name;
  near = n ? rg_nearest(name, names, n) : NULL;
  if (near)
    return rgi_fail(e, RG_E_USAGE, NULL, NULL, "the plan has no %s \"%s\"; did you mean \"%s\"?",
                    rgi_role_name(role), name, near);
  return rgi_fail(e, RG_E_USAGE, NULL, NULL,
                  "the plan has no %s \"%s\"; it has %d of that role%s%s%s", rgi_role_name(role),
                  name, n, n ? ", such as \"" : "", n ? names[0] : "", n ? "\"" : "");
}

rg_status rg_session_bind(rg_session *s, rg_role role, const char *name, void *ptr, size_t bytes,
                          rg_error *e) {
  if (!s) return rgi_fail(e, RG_E_USAGE, NULL, NULL, "the session is NULL");
  if (!name) return rgi_fail(e, RG_E_USAGE, NULL, NULL, "the name of the tensor to bind is NULL");
  const int i = (unsigned)role < RGI_ROLES ? rgi_names_get(&s->plan->by_name[role], name) : -1;
  if (i < 0) return unknown_name(s->plan, role, name, e);
  return rg_session_bind_index(s, (size_t)i, ptr, bytes, e);
}

/* What both ways to run ask of their arguments. */
static rg_status check_call(const rg_session *s, rg_direction direction, void *const *pointers,
                            size_t n, rg_error *e) {
  if (!s) return rgi_fail(e, RG_E_USAGE, NULL, NULL, "the session is NULL");
  if (direction != RG_FORWARD && direction != RG_BACKWARD)
    return rgi_fail(e, RG_E_USAGE, NULL, NULL,
                    "there is no direction %d; expected RG_FORWARD or RG_BACKWARD", (int)direction);
  if (!pointers || n != (size_t)s->plan->nbindable)
    return rgi_fail(e, RG_E_USAGE, NULL, NULL, "%zu pointers; the plan has %d tensors",
                    pointers ? n : 0, s->plan->nbindable);
  return RG_OK;
}

rg_status rg_session_run(rg_session *s, rg_direction direction, void *const *pointers, size_t n,
                         void *saved, void *scratch, rg_error *e) {
  RGI_TRY(check_call(s, direction, pointers, n, e));
  const rgi_bindable *b = s->plan->bindable;
  for (size_t i = 0; i < n; i++)
    if (takes(direction, b[i].info.role)) RGI_TRY(check_pointer(&b[i].info, pointers[i], e));
  char *const before = s->scratch;
  if (scratch) RGI_TRY(rg_session_bind_scratch(s, scratch, e));
  rg_status status = saved ? rg_session_bind_saved(s, saved, e) : RG_OK;
  if (status != RG_OK) {
    s->scratch = before;
    return status;
  }
  for (size_t i = 0; i < n; i++)
    if (takes(direction, b[i].info.role)) s->bound[i] = pointers[i];
  return direction == RG_FORWARD ? rg_session_forward(s, e) : rg_session_backward(s, e);
}

rg_status rg_session_run_on(rg_session *s, rg_direction direction, void *const *pointers, size_t n,
                            void *saved, void *scratch, void *stream, rg_error *e) {
  RGI_TRY(check_call(s, direction, pointers, n, e));
  if (!saved)
    return rgi_fail(e, RG_E_USAGE, NULL, NULL, "the saved block is NULL; expected this run's own");
  RGI_TRY(rg_session_set_stream(s, stream, e));
  if (direction == RG_BACKWARD) {
    for (size_t i = 0; i < n; i++)
      if (takes(RG_FORWARD, s->plan->bindable[i].info.role))
        RGI_TRY(
            rg_session_bind_index(s, i, pointers[i], (size_t)s->plan->bindable[i].info.bytes, e));
    RGI_TRY(rg_session_adopt_saved(s, saved, e));
  }
  rg_status status = rg_session_run(s, direction, pointers, n, saved, scratch, e);
  rg_session_forget_saved(s, saved, NULL);
  return status;
}
