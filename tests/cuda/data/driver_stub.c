/* A libcuda that computes nothing, for machines without a GPU: allocations are host memory, copies are memcpy,
 * launches are counted and checked (grid, context, parameters' addresses) and do nothing. With it the library types,
 * compiles, loads and launches its kernels for compute capability 9.0, and the host's part of a step can be counted
 * and timed. Values are not computed. STUB_NO_GPU=1: a driver that finds no GPU. STUB_DEVICES=n: so many GPUs.
 *
 *     cc -shared -fPIC -O2 -o FOLDER/libcuda.so.1 driver_stub.c -ldl
 *     LD_LIBRARY_PATH=FOLDER python script.py
 *
 * stub_counts(buffer) fills twelve longs, stub_fail(n) has allocations fail after n more, stub_ready(0) has the GPU
 * never come to an event. stub_log(buffer, n) fills n rows of what streams were told, oldest first, each of what it was
 * and two things: 1 launch (stream), 2 record (event, stream), 3 wait (stream, event), 4 synchronise (stream), 5 free
 * (address); it returns how many there were and begins anew.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <dlfcn.h>
#include <stdint.h>
#include <pthread.h>
typedef int R; typedef void* P; typedef unsigned long long D;
static __thread P stack_[64]; static __thread int sp=0;
static char ctxmem[8][64];
long n_alloc=0,n_free=0,n_free_noctx=0,n_launch=0,n_h2d=0,n_d2h=0,n_d2d=0,n_push=0,n_sync=0,n_evt=0,n_other=0; size_t bytes_alloc=0;
#define EX __attribute__((visibility("default")))
EX void stub_counts(long*o){long v[]={n_alloc,n_free,n_free_noctx,n_launch,n_h2d,n_d2h,n_d2d,n_push,n_sync,n_evt,(long)sp,(long)bytes_alloc};memcpy(o,v,sizeof v);}
static long rows[4096][3]; static int n_rows=0;
static void note(long what,P a,P b){if(n_rows<4096){rows[n_rows][0]=what;rows[n_rows][1]=(long)a;rows[n_rows][2]=(long)b;} n_rows++;}
EX int stub_log(long*o,int n){int m=n_rows<4096?n_rows:4096; if(n>m)n=m; if(o)memcpy(o,rows,n*sizeof rows[0]); n_rows=0; return m;}
static int ready=1; EX void stub_ready(int r){ready=r;}
/* Which GPU each allocation is of: that of the context in which it was made. */
static struct{D p;size_t n;int d;}owned[1<<14]; static int n_owned=0;
static int ordinal(void){for(int i=0;i<8;i++)if(sp&&stack_[sp-1]==(P)ctxmem[i])return i;return 0;}
static void own(D p,size_t n){if(n_owned<(1<<14)){owned[n_owned].p=p;owned[n_owned].n=n;owned[n_owned++].d=ordinal();}}
static void disown(D p){for(int i=0;i<n_owned;i++)if(owned[i].p==p){owned[i]=owned[--n_owned];return;}}
static int owner(D p){for(int i=0;i<n_owned;i++)if(p>=owned[i].p&&p<owned[i].p+owned[i].n)return owned[i].d;return 0;}
static int fail_after=-1; EX void stub_fail(int n){fail_after=n;}
EX R cuInit(unsigned f){return getenv("STUB_NO_GPU")?100:0;}
EX R cuDriverGetVersion(int*v){*v=12090;return 0;}
EX R cuDeviceGetCount(int*c){const char*n=getenv("STUB_DEVICES");*c=n?atoi(n):1;return 0;}
EX R cuDeviceGet(int*d,int i){*d=i;return 0;}
EX R cuDeviceGetName(char*n,int l,int d){strncpy(n,"STUB H100",l);return 0;}
EX R cuDeviceGetUuid(char*u,int d){memset(u,1+d,16);return 0;}
EX R cuDeviceTotalMem(size_t*b,int d){*b=80ull<<30;return 0;}
EX R cuDeviceGetAttribute(int*v,int a,int d){switch(a){case 75:*v=9;break;case 76:*v=0;break;case 16:*v=132;break;case 1:*v=1024;break;case 8:*v=49152;break;case 97:*v=232448;break;default:*v=1;}return 0;}
EX R cuDevicePrimaryCtxRetain(P*c,int d){*c=ctxmem[d];return 0;}
EX R cuDevicePrimaryCtxRelease(int d){return 0;}
EX R cuDevicePrimaryCtxReset(int d){return 0;}
EX R cuDevicePrimaryCtxGetState(int d,unsigned*f,int*a){*f=0;*a=1;return 0;}
EX R cuCtxPushCurrent(P c){n_push++;stack_[sp++]=c;return 0;}
EX R cuCtxPopCurrent(P*c){if(!sp)return 201;*c=stack_[--sp];return 0;}
EX R cuCtxGetCurrent(P*c){*c=sp?stack_[sp-1]:0;return 0;}
EX R cuCtxSetCurrent(P c){if(!c){if(sp)sp--;return 0;} if(sp)stack_[sp-1]=c;else stack_[sp++]=c;return 0;}
EX R cuCtxGetDevice(int*d){if(!sp)return 201;*d=ordinal();return 0;}
EX R cuCtxSynchronize(void){n_sync++;return 0;}
EX R cuCtxGetId(P c,unsigned long long*i){*i=1;return 0;}
EX R cuMemGetInfo(size_t*f,size_t*t){*f=70ull<<30;*t=80ull<<30;return 0;}
EX R cuMemAlloc(D*p,size_t n){ if(fail_after==0) return 2; if(fail_after>0) fail_after--; if(!sp)return 201; void*q; if(posix_memalign(&q,256,n?n:1))return 2; if(n<(1<<22))memset(q,0,n); *p=(D)q;own(*p,n?n:1);n_alloc++;bytes_alloc+=n;return 0;}
EX R cuMemFree(D p){n_free++; note(5,(P)p,0); if(!sp)n_free_noctx++; disown(p); free((void*)p);return 0;}
EX R cuMemcpyHtoD(D d,const void*s,size_t n){n_h2d++;memcpy((void*)d,s,n);return 0;}
EX R cuMemcpyHtoDAsync(D d,const void*s,size_t n,P st){n_h2d++;memcpy((void*)d,s,n);return 0;}
EX R cuMemcpyDtoH(void*d,D s,size_t n){n_d2h++;memcpy(d,(void*)s,n);return 0;}
EX R cuMemcpyDtoHAsync(void*d,D s,size_t n,P st){n_d2h++;memcpy(d,(void*)s,n);return 0;}
EX R cuMemcpyDtoD(D d,D s,size_t n){n_d2d++;memcpy((void*)d,(void*)s,n);return 0;}
EX R cuMemcpyDtoDAsync(D d,D s,size_t n,P st){n_d2d++;memcpy((void*)d,(void*)s,n);return 0;}
EX R cuMemsetD8(D d,unsigned char v,size_t n){memset((void*)d,v,n);return 0;}
EX R cuPointerGetAttribute(void*o,int a,D p){if(a==9)*(int*)o=owner(p);else *(P*)o=(P)p;return 0;}
EX R cuPointerGetAttributes(unsigned n,int*a,void**o,D p){for(unsigned i=0;i<n;i++){if(o[i])*(unsigned*)o[i]=2;}return 0;}
EX R cuStreamSynchronize(P s){n_sync++;note(4,s,0);return 0;}
EX R cuStreamCreate(P*s,unsigned f){*s=malloc(16);return 0;}
EX R cuStreamDestroy(P s){return 0;}
EX R cuStreamGetCtx(P s,P*c){*c=ctxmem[0];return 0;}
EX R cuStreamGetDevice(P s,int*d){*d=0;return 0;}
EX R cuStreamIsCapturing(P s,int*c){*c=0;return 0;}
EX R cuEventCreate(P*e,unsigned f){n_evt++;*e=malloc(16);return 0;}
EX R cuEventDestroy(P e){free(e);return 0;}
EX R cuEventRecord(P e,P s){note(2,e,s);return 0;}
EX R cuEventSynchronize(P e){n_sync++;return 0;}
EX R cuEventQuery(P e){return ready?0:600;}
EX R cuEventElapsedTime(float*m,P a,P b){*m=0.01f;return 0;}
EX R cuLibraryLoadData(P*l,const void*c,P a,P b,unsigned n,P o,P v,unsigned m){*l=malloc(16);return 0;}
EX R cuLibraryUnload(P l){return 0;}
EX R cuLibraryGetKernel(P*k,P l,const char*n){*k=malloc(16);return 0;}
EX R cuLibraryGetKernelCount(unsigned*c,P l){*c=1;return 0;}
EX R cuLibraryGetGlobal(D*p,size_t*b,P l,const char*n){return 500;}
EX R cuKernelGetFunction(P*f,P k){*f=k;return 0;}
EX R cuKernelGetAttribute(int*v,int a,P k,int d){*v=a==0?1024:32;return 0;}
EX R cuKernelSetAttribute(int a,int v,P k,int d){return 0;}
EX R cuKernelGetParamInfo(P k,size_t i,size_t*o,size_t*s){return 1;}
EX R cuKernelGetLibrary(P*l,P k){*l=k;return 0;}
EX R cuFuncGetAttribute(int*v,int a,P k){*v=32;return 0;}
struct cfg{unsigned g[3],b[3],sm;P st;P at;unsigned n;};
EX R cuLaunchKernelEx(struct cfg*c,P f,P*p,P*e){n_launch++; if(c->g[0]==0||c->g[1]==0||c->g[2]==0||c->g[1]>65535||c->g[2]>65535)return 1; if(!sp)return 201; return 0;}
EX R cuLaunchKernel(P f,unsigned a,unsigned b,unsigned c,unsigned d,unsigned g,unsigned h,unsigned sm,P st,P*p,P*e){n_launch++;note(1,st,0);
 if(!a||!b||!c||b>65535||c>65535||!d||d*g*h>1024||!f||(!p&&!e))return 1; if(!sp)return 201; return 0;}
EX R cuModuleLoadData(P*m,const void*c){if(!c||memcmp(c,"\177ELF",4))return 200;*m=malloc(16);return 0;}
EX R cuModuleUnload(P m){return 0;}
EX R cuModuleGetFunction(P*f,P m,const char*n){if(!n||!*n)return 500;*f=malloc(16);return 0;}
EX R cuStreamWaitEvent(P s,P e,unsigned f){note(3,s,e);return 0;}
EX R cuGetErrorName(R e,const char**s){*s=e==100?"CUDA_ERROR_NO_DEVICE":e==2?"CUDA_ERROR_OUT_OF_MEMORY":"CUDA_STUB_ERROR";return 0;}
EX R cuGetErrorString(R e,const char**s){*s="stub error";return 0;}
EX R cuGetProcAddress(const char*s,P*f,int v,uint64_t fl,int*st);
static P find(const char*s){static P h;Dl_info me;if(!h&&dladdr((void*)find,&me))h=dlopen(me.dli_fname,RTLD_NOW|RTLD_NOLOAD);P r=dlsym(h,s);char b[128];
 if(!r){ size_t L=strlen(s); if(L>3&&s[L-3]=='_'&&s[L-2]=='v'){strncpy(b,s,L-3);b[L-3]=0;r=dlsym(h,b);} }
 if(getenv("STUB_LOG")&&!r)fprintf(stderr,"STUB missing %s\n",s); return r;}
EX R cuGetProcAddress(const char*s,P*f,int v,uint64_t fl,int*st){*f=find(s); if(st)*st=*f?0:1; return *f?0:500;}
EX R cuGetProcAddress_v2(const char*s,P*f,int v,uint64_t fl,int*st){return cuGetProcAddress(s,f,v,fl,st);}
