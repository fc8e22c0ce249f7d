// A yardstick, not a server: the least work that one thread can do to pass events from a Redis channel to WebSocket
// clients. It parses no JSON, knows no projects and no rights, keeps no queues, and a client that does not read stops it.
// What it reaches on a machine is what the kernel allows there; `run.py` measures it beside Tidings.
//
// limit: the floor for one thread on this machine. Redis-fed, no JSON, no auth, no queues: reads what Redis has,
// builds frames once, one send() per subscriber per batch. usage: limit PORT REDISPORT CHANNEL [batch(1)|nobatch(0)]
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>
#include <signal.h>
static int fds[100000],nf;static char hs[100000];
static unsigned char out[4<<20];static size_t no;
static void sendall(int batchlen){(void)batchlen;for(int i=0;i<nf;i++){size_t o=0;while(o<no){ssize_t r=send(fds[i],out+o,no-o,0);if(r<0){if(errno==EAGAIN){usleep(50);continue;}break;}o+=r;}}no=0;}
static void frame(const char*p,size_t n){out[no++]=0x81;if(n<126)out[no++]=n;else if(n<65536){out[no++]=126;out[no++]=n>>8;out[no++]=n;}else{out[no++]=127;for(int i=7;i>=0;i--)out[no++]=(uint64_t)n>>(8*i);}memcpy(out+no,p,n);no+=n;}
int main(int c,char**v){signal(SIGPIPE,SIG_IGN);int port=atoi(v[1]),rp=atoi(v[2]);int batch=c>4?atoi(v[4]):1;int one=1;
 int l=socket(AF_INET,SOCK_STREAM|SOCK_NONBLOCK,0);setsockopt(l,SOL_SOCKET,SO_REUSEADDR,&one,4);struct sockaddr_in a={.sin_family=AF_INET,.sin_port=htons(port)};if(bind(l,(void*)&a,sizeof a)){perror("bind");return 1;}listen(l,4096);
 int r=socket(AF_INET,SOCK_STREAM,0);a.sin_port=htons(rp);inet_pton(AF_INET,"127.0.0.1",&a.sin_addr);if(connect(r,(void*)&a,sizeof a)){perror("redis");return 1;}
 char b[1<<16];int k=sprintf(b,"*2\r\n$9\r\nSUBSCRIBE\r\n$%zu\r\n%s\r\n",strlen(v[3]),v[3]);if(write(r,b,k)<0)return 1;if(read(r,b,sizeof b)<0)return 1;
 int ep=epoll_create1(0);struct epoll_event e={.events=EPOLLIN,.data.fd=l};epoll_ctl(ep,EPOLL_CTL_ADD,l,&e);e.data.fd=r;epoll_ctl(ep,EPOLL_CTL_ADD,r,&e);
 static char rb[2<<20];size_t rn=0;static struct epoll_event ev[512];
 for(;;){int n=epoll_wait(ep,ev,512,-1);for(int i=0;i<n;i++){int f=ev[i].data.fd;
  if(f==l){int s;while((s=accept4(l,0,0,SOCK_NONBLOCK))>=0){setsockopt(s,IPPROTO_TCP,TCP_NODELAY,&one,4);e.data.fd=s;epoll_ctl(ep,EPOLL_CTL_ADD,s,&e);}}
  else if(f==r){ssize_t m=recv(r,rb+rn,sizeof rb-rn,0);if(m<=0)return 0;rn+=m;size_t o=0;
   for(;;){char*p=rb+o,*end=rb+rn;if(p>=end)break;char*q=p;int ok=1;char*body=0;size_t bl=0;// *3 $7 message $n chan $n body
    char*nl=memmem(q,end-q,"\r\n",2);if(!nl)break;q=nl+2;for(int j=0;j<3;j++){nl=memmem(q,end-q,"\r\n",2);if(!nl){ok=0;break;}bl=strtoul(q+1,0,10);q=nl+2;if((size_t)(end-q)<bl+2){ok=0;break;}body=q;q+=bl+2;}
    if(!ok)break;frame(body,bl);o=q-rb;if(!batch||no>(3<<20))sendall(0);}
   memmove(rb,rb+o,rn-o);rn-=o;if(no)sendall(0);}
  else{ssize_t m=recv(f,b,sizeof b-1,0);if(m<=0){close(f);for(int j=0;j<nf;j++)if(fds[j]==f){fds[j]=fds[--nf];break;}hs[f]=0;continue;}
   if(!hs[f]){hs[f]=1;const char*x="HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n\x81\x02{}";if(write(f,x,strlen(x))<0){}fds[nf++]=f;}
   else {if(write(f,"\x81\x02{}",4)<0){}}}}}}
